"""A run: a configuration goes in, a trained student comes out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from medalign import config as settings
from medalign import distributed, pipeline
from medalign.checkpoint import export, lock
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.shards.index import ShardIndex
from medalign.engine import engine as deepspeed_engine
from medalign.engine import extensions
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings, precision
from medalign.errors import Stopped
from medalign.losses.build import build_objective
from medalign.losses.objective import Objective
from medalign.observability.files import write_text
from medalign.observability.watchdog import Watchdog
from medalign.run_folder import RunFolder
from medalign.stop_signals import stop_signals
from medalign.student import loading
from medalign.student.model import Student, check_causality
from medalign.teacher.loading import load_teacher, require_attention
from medalign.teacher.model import Teacher
from medalign.teacher.targets import assert_replicated
from medalign.training import schedule
from medalign.training.callbacks import (
    Callback,
    Checkpointing,
    Heartbeat,
    MetricLogger,
    Profiler,
    StopOnSignal,
    Validation,
)
from medalign.training.gauges import build_gauges
from medalign.training.loggers import build_loggers
from medalign.training.same_run import require_same_run
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

    Raises:
        ConfigError: a setting is unknown, has the wrong type or range, or contradicts another one.
        Stopped: USR1 or TERM ended the run early; the same call again continues it.
    """
    config = settings.check(config)
    distributed.adopt_launcher()
    distributed.set_up_logging()
    folder = Path(config.run.dir)
    ds_settings = deepspeed_settings(config, distributed.world_size())
    with stop_signals() as received, Watchdog(RunFolder(folder).stacks) as watchdog:
        watchdog.beat("waiting for the other ranks", config.engine.start_timeout)
        deepspeed_engine.start(ds_settings)
        try:
            with lock.held(folder), distributed.log_file(RunFolder(folder).log(distributed.rank())):
                own = [Heartbeat(watchdog, config.engine.start_timeout, config.engine.step_timeout)]
                _train(config, folder, ds_settings, watchdog, [*own, StopOnSignal(received), *callbacks])
        except Stopped:
            distributed.barrier()  # srun kills the other ranks soon after the first one has ended
            raise
        finally:
            deepspeed_engine.stop()
    return folder


def _train(
    config: Config, folder: Path, ds_settings: dict[str, Any], watchdog: Watchdog, callbacks: Sequence[Callback]
) -> None:
    def begin(what: str, more: float = 0.0) -> None:
        limit = config.engine.start_timeout
        watchdog.beat(what, limit + more if limit else 0.0)

    begin("reading the shards' indexes")
    objective, index, held_out = _open(config)
    begin("checking the checkpoints")
    found, now = _find_start(config, folder, ds_settings, index)
    config = schedule.resolve_steps(config, len(index) if index else 0)
    log.info("%s", schedule.describe_length(config, len(index) if index else 0))
    begin("loading the models", more=extensions.build_timeout(ds_settings))
    engine, teacher, student, collator = _build(config, ds_settings, _max_images(index, held_out))
    if found:
        begin("loading the checkpoint")
        now = replace(load(engine, found), stage=now.stage, data=now.data)
        log.info("resuming from %s", found)
    begin("starting to train")
    with distributed.raise_on_all_ranks():
        loggers = _write_config_and_open_loggers(config, folder, now) if distributed.is_main() else []
    for logger in loggers:
        watchdog.on_hang.append(logger.on_hang)
    save = _checkpoint_writer(config, RunFolder(folder).checkpoints.path, engine, student).save
    try:
        if index is None:
            if not found:
                save(now)
        else:
            step = TrainStep(engine, teacher, objective, student.spec.grid)
            loader = pipeline.build_loader(config, index, collator, now.step)
            sizes = [int(index.shard_sizes(number).sum()) for number in range(len(config.data.folders))]
            gauges = build_gauges(config, loader.order, sizes, student, teacher, engine.device)
            hooks = [*loggers, *gauges, *build_callbacks(config, folder, held_out, collator), *callbacks]
            hooks.append(Checkpointing(config.checkpoint.interval, save, config.checkpoint.retry_minutes))
            now = Trainer(config, step, iter(loader), now, hooks).fit()
    finally:
        for logger in loggers:
            logger.close()
    _log_summary(config, folder, now)


def _open(config: Config) -> tuple[Objective, ShardIndex | None, ShardIndex | None]:
    """Return the losses, and the indexes of the training shards and the held-out ones, after all quick checks."""
    with distributed.raise_on_all_ranks():
        objective = build_objective(config)
        index, held_out = pipeline.open_indexes(config)
        if index is not None:
            pipeline.require_images(config, index)
        pipeline.check_collator(config, None, _max_images(index, held_out))
    return objective, index, held_out


def _find_start(
    config: Config, folder: Path, ds_settings: dict[str, Any], index: ShardIndex | None
) -> tuple[Path | None, TrainState]:
    """Return the checkpoint to resume from, which belongs to these settings, and the state of a run without one."""
    found = find_whole(RunFolder(folder).checkpoints.path)
    stage, data = deepspeed_engine.stage(ds_settings), index.fingerprint() if index else ()
    now = TrainState(step=0, samples=0, ranks=distributed.world_size(), stage=stage, data=data)
    if found:
        with distributed.raise_on_all_ranks():
            require_same_run(config, now, found, RunFolder(folder).config)
    return found, now


def _checkpoint_writer(config: Config, root: Path, engine: Engine, student: Student) -> CheckpointWriter:
    """What writes the checkpoints of this run; every rank must use it."""

    def write_export(target: Path) -> None:
        whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
        if distributed.is_main():
            export.write_export(student, whole, config.student, config.data.max_length, target)

    return CheckpointWriter(engine, root, config.checkpoint.save_total_limit, settings.dump(config), write_export)


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
    teacher_view = teacher.preprocess_cfg if teacher is not None else None
    collator = pipeline.build_collator(config, student.spec, processor, teacher_view, max_images)
    check_causality(student, sanity_batch(collator).to(engine.device))
    return engine, teacher, student, collator


def build_teacher(config: Config) -> Teacher | None:
    """The teacher of this rank, frozen; None when nothing is distilled."""
    if not config.distils or config.train.steps == 0:
        return None
    require_attention(config)
    return load_teacher(device=distributed.device(), dtype=precision(config), **vars(config.teacher))


def _max_images(*indexes: ShardIndex | None) -> int:
    return max((index.max_images for index in indexes if index is not None), default=1)


def build_callbacks(config: Config, folder: Path, held_out: ShardIndex | None, collator: Collator) -> list[Callback]:
    """The callbacks of every rank that the settings ask for, apart from checkpoints."""
    callbacks: list[Callback] = []
    if config.log.profile_steps:
        callbacks.append(Profiler(config.log.profile_steps, RunFolder(folder).profile))
    if held_out is not None:
        batches = pipeline.build_validation_loader(config, held_out, collator)
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


def _log_summary(config: Config, folder: Path, now: TrainState) -> None:
    log.info(
        "%s: %d steps, %d samples; %d bad samples replaced, %d cut to %d tokens",
        folder,
        now.step,
        now.samples,
        now.skipped,
        now.truncated,
        config.data.max_length,
    )
