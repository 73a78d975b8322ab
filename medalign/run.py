"""A run: configuration in, a trained student out. The one place where all rooms meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medalign import config as settings
from medalign import distributed
from medalign.checkpoint import export, lock, state
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator, PreprocessCfg
from medalign.data.batches.loader import TrainLoader
from medalign.data.batches.prompts import PromptEncoder
from medalign.data.order.mixture import LengthGroupedOrder, Mixture
from medalign.data.order.order import GlobalOrder, Order
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.table import image_share
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.engine import engine as deepspeed_engine
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings, precision
from medalign.errors import ConfigError
from medalign.losses.objective import Objective
from medalign.observability.files import write_text
from medalign.observability.sinks import ConsoleSink, JsonlSink, Sink, WandbSink
from medalign.student import loading
from medalign.student.checks import check_student
from medalign.student.families import ModelSpec
from medalign.student.model import Student, check_causality
from medalign.teacher.clip import Teacher, load_teacher
from medalign.teacher.targets import assert_replicated
from medalign.training import schedule, trainer
from medalign.training.step import TrainStep

log = logging.getLogger("medalign")


def train(config: Config) -> Path:
    """Train, or go on with, the run in `config.run.dir`. Every rank calls it. Returns the run's folder."""
    distributed.adopt_launcher()
    distributed.set_up_logging()
    folder = Path(config.run.dir)
    ds_settings = deepspeed_settings(config, distributed.world_size())
    deepspeed_engine.start(ds_settings)
    try:
        with lock.held(folder):
            _train(config, folder, ds_settings)
    finally:
        deepspeed_engine.stop()
    return folder


def _train(config: Config, folder: Path, ds_settings: dict[str, Any]) -> None:
    with distributed.raise_on_all_ranks():
        index = open_index(config) if config.train.steps != 0 else None
        if index is not None:
            require_images(config, index)
        check_collator(config, None, index.max_images if index else 1)
    found = state.latest(folder / "checkpoints")
    stage, data = deepspeed_engine.stage(ds_settings), index.fingerprint() if index else ()
    progress = TrainState(step=0, samples=0, ranks=distributed.world_size(), stage=stage, data=data)
    if found:
        with distributed.raise_on_all_ranks():
            _require_same_run(config, progress, found, folder / "config.yaml")
    samples = len(index) if index else 0
    config = schedule.resolve_steps(config, samples)
    log.info("%s", schedule.describe_length(config, samples))
    engine, teacher, student, collator = _build(config, ds_settings, index)
    if found:
        progress = replace(state.load(engine, found), stage=stage, data=data)
        log.info("going on from %s", found)
    with distributed.raise_on_all_ranks():
        sinks = _write_config_and_open_loggers(config, folder, progress) if distributed.is_main() else []

    def save(now: TrainState) -> None:
        state.save(engine, folder / "checkpoints", now, config.checkpoint.keep, write_export)

    def write_export(target: Path) -> None:
        whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
        if distributed.is_main():
            export.write_export(student, whole, config.student, config.data.max_length, target)

    try:
        if index is None:
            if not found:
                save(progress)
        elif progress.step < schedule.total_steps(config.train):
            step = TrainStep(engine, teacher, build_objective(config), student.spec.grid)
            batches = iter(build_loader(config, index, collator, progress))
            progress = trainer.train(config, step, batches, progress, sinks, save)
    finally:
        for sink in sinks:
            sink.close()
    _log_summary(config, folder, progress)


def _build(
    config: Config, ds_settings: dict[str, Any], index: ShardIndex | None
) -> tuple[Engine, Teacher | None, Student, Collator]:
    # The teacher comes first: what is built once ZeRO-3 partitions modules would be partitioned too.
    teacher = build_teacher(config)
    with deepspeed_engine.sharded_loading(ds_settings):
        student = loading.load_student(config.student, precision(config), config.run.seed)
    student.attention_capture.impl = config.losses.impl
    student.train()
    engine = Engine(student, parameter_groups(student, config), ds_settings)
    if teacher is not None:
        assert_replicated(teacher)
    processor = loading.load_processor(config.student)
    collator = build_collator(config, student, processor, teacher, index.max_images if index else 1)
    check_causality(student, sanity_batch(collator).to(engine.device))
    return engine, teacher, student, collator


def build_teacher(config: Config) -> Teacher | None:
    """The teacher of this rank, frozen; None when nothing is distilled."""
    if not config.distils or config.train.steps == 0:
        return None
    return load_teacher(
        config.teacher.path,
        distributed.device(),
        precision(config),
        random_weights_seed=config.teacher.random_weights_seed,
        features=config.teacher.features,
    )


def build_collator(
    config: Config, student: Student, processor: Any, teacher: Teacher | None, max_images: int
) -> Collator:
    """Samples to batches, for this student and this teacher."""
    view = PreprocessCfg(teacher.image_size, teacher.mean, teacher.std) if teacher is not None else None
    return collator_of(config, student.spec, processor, view, max_images)


def collator_of(
    config: Config, anatomy: ModelSpec, processor: Any, teacher_view: PreprocessCfg | None, max_images: int
) -> Collator:
    """Samples of up to `max_images` images to batches, for models of which only the shapes are known."""
    eye = loading.eye(processor, anatomy.image_size)
    encoder = PromptEncoder(
        processor,
        image_token_id=anatomy.image_token_id,
        tokens_per_image=anatomy.grid.size,
        max_length=config.data.max_length,
        max_images=max_images,
    )
    view = PreprocessCfg(eye.size, eye.mean, eye.std)
    rows = config.losses.attention_rows
    return Collator(encoder, view, teacher_view, anatomy.grid, packed=config.data.packing, attention_rows=rows)


def check_collator(config: Config, teacher_view: PreprocessCfg | None, max_images: int) -> tuple[Collator, Any]:
    """The collator and the processor of a student of which no weight is read.

    Raises ConfigError, in seconds, for every reason known before that why the student cannot be trained.
    """
    anatomy, processor = check_student(config.student)
    return collator_of(config, anatomy, processor, teacher_view, max_images), processor


def build_objective(config: Config) -> Objective:
    losses = config.losses
    return Objective(
        alpha=losses.alpha,
        beta=losses.beta,
        normalize=losses.normalize,
        language_mean=losses.language_mean,
        weighting=losses.weighting,
        ignore_padding=losses.ignore_padding,
        impl=losses.impl,
    )


def open_index(config: Config) -> ShardIndex:
    """The training folders' index."""
    data = config.data
    cache = Path(data.cache_dir) if data.cache_dir else None
    access = StorageOptions(retries=data.retries, cache=cache, cache_bytes=int(data.cache_gib * 2**30))
    return ShardIndex.open(data.folders, access)


def require_images(config: Config, index: ShardIndex) -> None:
    """Log how many samples of each folder have an image. Raises ConfigError where none has and images are distilled."""
    bare = [index.without_image(number) for number in range(len(config.data.folders))]
    counts = [int(index.shard_sizes(number).sum()) for number in range(len(config.data.folders))]
    for folder, samples, without in zip(config.data.folders, counts, bare, strict=True):
        log.info("%s: %d samples, %s", folder, samples, image_share(samples, without))
    if sum(bare) < sum(counts):
        return
    if config.distils:
        raise ConfigError(
            f"no sample of data.train {', '.join(config.data.folders)} has an image, but losses.alpha "
            f"{config.losses.alpha} and losses.beta {config.losses.beta} distil from images; name folders with images, "
            "see what `medalign shards index` says of these, or set both to 0 to train on text"
        )
    log.warning("no sample of data.train has an image: the student is trained on text only")


def build_order(config: Config, index: ShardIndex) -> Order:
    """The order of all samples, from the settings alone: the same on every rank."""
    data, seed = config.data, config.run.seed
    sizes = [index.shard_sizes(folder) for folder in range(len(data.folders))]
    order: Order
    if data.weights:
        streams = [
            GlobalOrder(int(shards.sum()), seed, shards=shards, block=data.shuffle_block, stream=number)
            for number, shards in enumerate(sizes)
        ]
        order = Mixture(streams, data.weights, seed)
    else:
        order = GlobalOrder(len(index), seed, shards=np.concatenate(sizes), block=data.shuffle_block)
    if data.length_groups > 1:
        batch, groups = config.train.batch_size, data.length_groups
        order = LengthGroupedOrder(order, index.lengths, global_batch=batch, groups=groups, seed=seed)
    return order


def build_loader(config: Config, index: ShardIndex, collator: Collator, progress: TrainState) -> TrainLoader:
    """The batches of this rank, from the step where the run stands."""
    return TrainLoader(
        index,
        build_order(config, index),
        collator,
        global_batch=config.train.batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        start_step=progress.step,
        workers=config.data.workers,
    )


def build_sinks(config: Config, folder: Path, progress: TrainState) -> list[Sink]:
    """Where the numbers of this run go; rank 0 alone calls it."""
    whole = {section: vars(getattr(config, section)) for section in vars(config)}
    log_settings = config.log
    return [
        ConsoleSink(schedule.total_steps(config.train), start=progress.step),
        JsonlSink(folder / "metrics.jsonl", resumed_step=progress.step),
        WandbSink(
            log_settings.wandb,
            folder,
            project=log_settings.project,
            entity=log_settings.entity,
            name=log_settings.name,
            config=whole,
        ),
    ]


def sanity_batch(collator: Collator) -> Batch:
    """A small batch, two questions of unlike length about a gray picture, to try the model on before the first step."""
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    questions = ("Is this study normal?", "Where is the abnormality?")
    return collator([Sample("probe", "none", "vqa", question, "yes", "closed", (gray,)) for question in questions])


def parameter_groups(student: Student, config: Config) -> list[dict[str, Any]]:
    """One group a kind of parameter, with its learning rate and weight decay."""
    peaks, decays = schedule.peaks(config.train), schedule.decays(config.train)
    return [
        {"name": name, "params": [p for _, p in named], "lr": peaks[name], "weight_decay": decays[name]}
        for name, named in student.trainable().items()
    ]


def _write_config_and_open_loggers(config: Config, folder: Path, progress: TrainState) -> list[Sink]:
    """Only now, when nothing can refuse the run any more, are its settings written down."""
    write_text(folder / "config.yaml", settings.dump(config))
    return build_sinks(config, folder, progress)


def _require_same_run(config: Config, now: TrainState, found: Path, path: Path) -> None:
    """Raises ConfigError where `found` is a checkpoint of other settings, another ZeRO stage or other data."""
    engine = ""
    if path.is_file():
        written = settings.read(path)
        _require_same(written, config, path)
        engine = f" {written.engine.deepspeed}"
    before = state.read_state(found)
    if before.stage not in (None, now.stage):
        raise ConfigError(
            f"{found} is of ZeRO stage {before.stage}, engine.deepspeed {config.engine.deepspeed} is of stage "
            f"{now.stage}: a run goes on with the stage it began with; restore --engine.deepspeed{engine}, or name a "
            "new folder with --run.dir"
        )
    if not before.data:
        log.warning("%s does not say what data it was trained on: whether data.train is the same is not checked", found)
    elif before.data != now.data:
        raise ConfigError(
            f"data.train is not what {found} was trained on: {'; '.join(before.data)} then, {'; '.join(now.data)} "
            "now. A run goes on with the same shards, folders in the same order; restore them, or name a new folder "
            "with --run.dir"
        )


def _require_same(before: Config, now: Config, path: Path) -> None:
    for section in ("run", "data", "teacher", "student", "losses", "train"):
        for key, value in vars(getattr(now, section)).items():
            old, name = getattr(getattr(before, section), key), f"{section}.{key}"
            # A model's folder may have moved with everything above it; its own name stays.
            same = Path(old).name == Path(value).name if name in _MODELS else old == value
            by_epochs = name == "train.steps" and old is None  # then train.epochs is what differs
            if not same and not by_epochs and name not in _MAY_CHANGE:
                raise ConfigError(
                    f"{path} has {name} = {old}, the command says {value}: a run goes on with the settings "
                    "it began with; restore them, or name a new folder with --run.dir"
                )


_MODELS: Sequence[str] = ("student.path", "teacher.path")
_MAY_CHANGE: Sequence[str] = (
    "run.dir",
    "data.train",
    "data.workers",
    "data.packing",
    "data.retries",
    "data.cache_dir",
    "data.cache_gib",
    "train.micro_batch_size",
    "student.gradient_checkpointing",
)


def _log_summary(config: Config, folder: Path, progress: TrainState) -> None:
    log.info(
        "%s: %d steps, %d samples; %d bad samples replaced, %d cut to %d tokens",
        folder,
        progress.step,
        progress.samples,
        progress.skipped,
        progress.truncated,
        config.data.max_length,
    )
