"""A run: configuration in, a trained student out. The one place where all rooms meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from medalign.data.batches.collator import Collator
from medalign.data.batches.loader import TrainLoader, ValidationLoader
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
from medalign.geometry import PreprocessCfg
from medalign.losses.build import build_objective
from medalign.observability.files import write_text
from medalign.observability.sinks import ConsoleSink, JsonlSink, WandbSink
from medalign.run_folder import RunFolder
from medalign.student import loading
from medalign.student.checks import check_student
from medalign.student.families import ModelSpec
from medalign.student.model import Student, check_causality
from medalign.teacher.clip import Teacher, load_teacher
from medalign.teacher.targets import assert_replicated
from medalign.training import schedule
from medalign.training.callbacks import Callback, Checkpointing, ConsoleLogger, MetricLogger, Profiler, Validation
from medalign.training.step import TrainStep
from medalign.training.trainer import Trainer

log = logging.getLogger("medalign")


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Path:
    """Train, or resume, the run in `config.run.dir`. Every rank must call it.

    Args:
        config: the whole configuration.
        callbacks: called after the run's own, but before checkpoints are written.

    Returns:
        The run's folder.
    """
    distributed.adopt_launcher()
    distributed.set_up_logging()
    folder = Path(config.run.dir)
    ds_settings = deepspeed_settings(config, distributed.world_size())
    deepspeed_engine.start(ds_settings)
    try:
        with lock.held(folder):
            _train(config, folder, ds_settings, callbacks)
    finally:
        deepspeed_engine.stop()
    return folder


def _train(config: Config, folder: Path, ds_settings: dict[str, Any], callbacks: Sequence[Callback]) -> None:
    with distributed.raise_on_all_ranks():
        objective = build_objective(config)
        index, held_out = open_indexes(config)
        if index is not None:
            require_images(config, index)
        check_collator(config, None, _max_images(index, held_out))
    found = state.latest(RunFolder(folder).checkpoints.path)
    stage, data = deepspeed_engine.stage(ds_settings), index.fingerprint() if index else ()
    now = TrainState(step=0, samples=0, ranks=distributed.world_size(), stage=stage, data=data)
    if found:
        with distributed.raise_on_all_ranks():
            _require_same_run(config, now, found, RunFolder(folder).config)
    samples = len(index) if index else 0
    config = schedule.resolve_steps(config, samples)
    log.info("%s", schedule.describe_length(config, samples))
    engine, teacher, student, collator = _build(config, ds_settings, _max_images(index, held_out))
    if found:
        now = replace(state.load(engine, found), stage=stage, data=data)
        log.info("going on from %s", found)
    with distributed.raise_on_all_ranks():
        loggers = _write_config_and_open_loggers(config, folder, now) if distributed.is_main() else []
    save = _saver(config, RunFolder(folder).checkpoints.path, engine, student)
    try:
        if index is None:
            if not found:
                save(now)
        elif now.step < schedule.total_steps(config.train):
            step = TrainStep(engine, teacher, objective, student.spec.grid)
            batches = iter(build_loader(config, index, collator, now))
            hooks = [*loggers, *build_callbacks(config, folder, held_out, collator), *callbacks]
            hooks.append(Checkpointing(config.checkpoint.interval, save))
            now = Trainer(config, step, batches, now, hooks).fit()
    finally:
        for logger in loggers:
            logger.close()
    _log_summary(config, folder, now)


def _saver(config: Config, root: Path, engine: Engine, student: Student) -> Callable[[TrainState], Path]:
    """The function that writes the checkpoint of a state; every rank must call it."""

    def write_export(target: Path) -> None:
        whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
        if distributed.is_main():
            export.write_export(student, whole, config.student, config.data.max_length, target)

    return lambda now: state.save(engine, root, now, config.checkpoint.save_total_limit, write_export)


def _build(
    config: Config, ds_settings: dict[str, Any], max_images: int
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
    collator = build_collator(config, student, processor, teacher, max_images)
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
    teacher_view = teacher.preprocess_cfg if teacher is not None else None
    return collator_of(config, student.spec, processor, teacher_view, max_images)


def collator_of(
    config: Config, anatomy: ModelSpec, processor: Any, teacher_view: PreprocessCfg | None, max_images: int
) -> Collator:
    """Samples of up to `max_images` images to batches, for models of which only the shapes are needed."""
    encoder = PromptEncoder(
        processor,
        image_token_id=anatomy.image_token_id,
        tokens_per_image=anatomy.grid.size,
        max_length=config.data.max_length,
        max_images=max_images,
    )
    view = loading.preprocess_cfg(processor, anatomy.image_size)
    rows = config.losses.attention_rows
    return Collator(encoder, view, teacher_view, anatomy.grid, packed=config.data.packing, attention_rows=rows)


def check_collator(config: Config, teacher_view: PreprocessCfg | None, max_images: int) -> tuple[Collator, Any]:
    """The collator and the processor of the student, without reading its weights.

    Raises:
        ConfigError: within seconds, for everything that can be known without the weights and prevents training.
    """
    anatomy, processor = check_student(config.student)
    return collator_of(config, anatomy, processor, teacher_view, max_images), processor


def open_index(config: Config, folders: Sequence[str] | None = None) -> ShardIndex:
    """The index of these folders of shards; by default, of the training folders."""
    data = config.data
    return ShardIndex.open(data.folders if folders is None else folders, StorageOptions.from_settings(data))


def open_indexes(config: Config) -> tuple[ShardIndex | None, ShardIndex | None]:
    """The index of the training folders, and that of the held-out folders; None for what the run does not read."""
    if config.train.steps == 0:
        return None, None
    held_out = open_index(config, config.data.validation_folders) if config.train.evaluate_every else None
    return open_index(config), held_out


def _max_images(*indexes: ShardIndex | None) -> int:
    return max((index.max_images for index in indexes if index is not None), default=1)


def require_images(config: Config, index: ShardIndex) -> None:
    """Log how many samples of each folder have an image.

    Raises:
        ConfigError: none has, and images are distilled.
    """
    folders = range(len(config.data.folders))
    bare = [index.without_image(folder) for folder in folders]
    counts = [int(index.shard_sizes(folder).sum()) for folder in folders]
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
            GlobalOrder(int(shards.sum()), seed, shards=shards, block=data.shuffle_block, stream=folder)
            for folder, shards in enumerate(sizes)
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


def build_loggers(config: Config, folder: Path, now: TrainState) -> list[MetricLogger]:
    """The callbacks that write the metrics of this run; only rank 0 calls it."""
    whole = {section: vars(getattr(config, section)) for section in vars(config)}
    settings = config.log
    wandb = WandbSink(
        settings.wandb, folder, project=settings.project, entity=settings.entity, name=settings.name, config=whole
    )
    return [
        ConsoleLogger(ConsoleSink(schedule.total_steps(config.train), start=now.step)),
        MetricLogger(JsonlSink(RunFolder(folder).metrics, resumed_step=now.step)),
        MetricLogger(wandb),
    ]


def build_callbacks(config: Config, folder: Path, held_out: ShardIndex | None, collator: Collator) -> list[Callback]:
    """The callbacks of every rank that the settings ask for, apart from checkpoints."""
    callbacks: list[Callback] = []
    if config.log.profile_steps:
        callbacks.append(Profiler(config.log.profile_steps, RunFolder(folder).profile))
    if held_out is not None:
        batches = ValidationLoader(
            held_out,
            collator,
            micro_batch=config.train.micro_batch_size,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=config.data.workers,
        )
        callbacks.append(Validation(config.train.evaluate_every, batches))
    return callbacks


def sanity_batch(collator: Collator) -> Batch:
    """Two questions of different lengths about a gray image, to check the model before the first step."""
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    questions = ("Is this study normal?", "Where is the abnormality?")
    return collator([Sample("probe", "none", "vqa", question, "yes", "closed", (gray,)) for question in questions])


def parameter_groups(student: Student, config: Config) -> list[dict[str, Any]]:
    """One group per kind of parameter, with its learning rate, weight decay and settings of AdamW."""
    peaks, decays = schedule.peaks(config.train), schedule.decays(config.train)
    return [
        {
            "name": name,
            "params": [p for _, p in named],
            "lr": peaks[name],
            "weight_decay": decays[name],
            "betas": config.optimizer.betas,
            "eps": config.optimizer.eps,
        }
        for name, named in student.trainable().items()
    ]


def _write_config_and_open_loggers(config: Config, folder: Path, now: TrainState) -> list[MetricLogger]:
    """Write config.yaml and open the loggers, once nothing can refuse the run any more; only rank 0 calls it."""
    write_text(RunFolder(folder).config, settings.dump(config))
    return build_loggers(config, folder, now)


def _require_same_run(config: Config, now: TrainState, found: Path, path: Path) -> None:
    """Check that the checkpoint `found` belongs to these settings, this ZeRO stage and this data.

    Raises:
        ConfigError: it does not.
    """
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
    for section in ("run", "data", "teacher", "student", "losses", "train", "optimizer"):
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
    "data.validation",
    "data.workers",
    "data.packing",
    "data.retries",
    "data.cache_dir",
    "data.cache_gib",
    "train.micro_batch_size",
    "train.evaluate_every",
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
