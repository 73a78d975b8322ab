"""A run: a configuration goes in, a trained student comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medalign import config as settings
from medalign import distributed, exit_records, pipeline, target_cache
from medalign.assembly import build_callbacks, build_models
from medalign.checkpoint import export, lock
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.retention import Retention
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.data.batches.collator import Collator
from medalign.data.shards.index import ShardIndex
from medalign.engine import engine as deepspeed_engine
from medalign.engine import extensions
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings
from medalign.errors import ConfigError, Stopped
from medalign.losses.build import build_objective
from medalign.losses.objective import Objective
from medalign.observability.files import write_text
from medalign.observability.watchdog import STATUS as HANG
from medalign.observability.watchdog import Watchdog
from medalign.run_folder import RunFolder
from medalign.stop_signals import stop_signals
from medalign.student.model import Student
from medalign.training import rewind, schedule
from medalign.training.callbacks import (
    Callback,
    Checkpointing,
    Heartbeat,
    MetricLogger,
    StopOnSignal,
)
from medalign.training.gauges import build_gauges
from medalign.training.loggers import build_loggers
from medalign.training.same_run import continue_state, require_same_run
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
    with exit_records.recorded(RunFolder(Path(config.run.dir))) as recorder:
        return _train_or_stop(config, callbacks, recorder)


def _train_or_stop(config: Config, callbacks: Sequence[Callback], recorder: exit_records.Recorder) -> Path:
    folder = Path(config.run.dir)
    ds_settings = deepspeed_settings(config, distributed.world_size())
    deepspeed_engine.require_valid(ds_settings, config.engine.deepspeed)

    def record_hang(verdict: str) -> None:
        recorder.write(HANG, verdict)

    with stop_signals() as received, Watchdog(RunFolder(folder).stacks, on_hang=record_hang) as watchdog:
        watchdog.beat("waiting for the other ranks", config.engine.start_timeout)
        deepspeed_engine.start(ds_settings)
        try:
            with lock.held(folder), distributed.log_file(RunFolder(folder).log(distributed.rank())):
                recorder.own()
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
    found, now = _find_start(config, folder, ds_settings, index, held_out)
    config = schedule.resolve_steps(config, len(index) if index else 0)
    log.info("%s", schedule.describe_length(config, len(index) if index else 0))
    begin("loading the models", more=extensions.build_timeout(ds_settings))
    engine, teachers, student, collator = build_models(config, ds_settings, _max_images(index, held_out))
    if found:
        begin("loading the checkpoint")
        now = continue_state(load(engine, found, begin), now)
        log.info("resuming from %s", found)
    begin("starting to train")
    writer = _checkpoint_writer(config, RunFolder(folder).checkpoints.path, engine, student)
    if index is not None:
        sizes = [int(index.shard_sizes(number).sum()) for number in range(len(config.data.folders))]
        order = pipeline.build_order(config, index)
        gauges = build_gauges(config, order, sizes, student, teachers, engine.device)
        hooks = [*gauges, *build_callbacks(config, folder, held_out, collator), *callbacks]
        background = writer if config.checkpoint.asynchronous else None
        hooks.append(
            Checkpointing(config.checkpoint.interval, writer.save, config.checkpoint.retry_minutes, background)
        )
        first, also = (teachers[0] if teachers else None), teachers[1:]
        step = TrainStep(engine, first, objective, student.spec.grid, also)
        now = _fit(config, folder, now, step, index, collator, hooks, begin)
    elif not found:
        with _loggers(config, folder, now):
            writer.save(now)
    _log_summary(config, folder, now)


def _fit(
    config: Config,
    folder: Path,
    now: TrainState,
    step: TrainStep,
    index: ShardIndex,
    collator: Collator,
    hooks: Sequence[Callback],
    begin: Callable[[str, float], None],
) -> TrainState:
    """Train up to the last step, and return the state. The arguments are what the trainer and a rewind need."""

    @contextmanager
    def open_trainer(now: TrainState) -> Iterator[Trainer]:
        with _loggers(config, folder, now) as loggers:
            batches = iter(pipeline.build_loader(config, index, collator, now.next_batch))
            yield Trainer(config, step, batches, now, [*loggers, *hooks])

    return rewind.fit(open_trainer, now, step.engine, RunFolder(folder).checkpoints.path, config.train, begin)


@contextmanager
def _loggers(config: Config, folder: Path, now: TrainState) -> Iterator[list[MetricLogger]]:
    """Write config.yaml and open the loggers, once nothing can refuse the run any more. Every rank must enter it."""
    with distributed.raise_on_all_ranks():
        loggers = _write_config_and_open_loggers(config, folder, now) if distributed.is_main() else []
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


def _open(config: Config) -> tuple[Objective, ShardIndex | None, ShardIndex | None]:
    """Return the losses, and the indexes of the training shards and the held-out ones, after all quick checks."""
    with distributed.raise_on_all_ranks():
        objective = build_objective(config)
        _require_metric(config, objective)
        index, held_out = pipeline.open_indexes(config)
        if index is not None:
            pipeline.require_images(config, index)
        collator, _ = pipeline.check_collator(config, None, _max_images(index, held_out))
        if distributed.is_main() and index is not None:
            target_cache.check(config, collator, [index, held_out])
    return objective, index, held_out


def _require_metric(config: Config, objective: Objective) -> None:
    computed = [term.name for term in objective.terms if config.distils or not hasattr(term, "teacher")]
    name, known = config.train.best_metric, ["loss/total", *(f"loss/{term}" for term in computed)]
    if name not in known:
        raise ConfigError(f"train.best_metric {name!r} is not a loss of this run; use one of {', '.join(known)}")


def _find_start(
    config: Config,
    folder: Path,
    ds_settings: dict[str, Any],
    index: ShardIndex | None,
    held_out: ShardIndex | None,
) -> tuple[Path | None, TrainState]:
    """Return the checkpoint to resume from, which belongs to these settings, and the state of a run without one."""
    found = find_whole(RunFolder(folder).checkpoints.path)
    now = TrainState(
        step=0,
        samples=0,
        ranks=distributed.world_size(),
        stage=deepspeed_engine.stage(ds_settings),
        data=index.fingerprint() if index else (),
        held_out=held_out.fingerprint() if held_out else (),
    )
    if found:
        with distributed.raise_on_all_ranks():
            require_same_run(config, now, found, RunFolder(folder).config)
    return found, now


def _checkpoint_writer(config: Config, root: Path, engine: Engine, student: Student) -> CheckpointWriter:
    """What writes the checkpoints of this run; every rank must use it."""

    def gather_export() -> Callable[[Path], None]:
        whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
        return lambda target: export.write_export(student, whole, config.student, config.data.max_length, target)

    retention = Retention(config.checkpoint.save_total_limit, config.checkpoint.keep_interval)
    return CheckpointWriter(engine, root, retention, settings.dump(config), gather_export)


def _max_images(*indexes: ShardIndex | None) -> int:
    return max((index.max_images for index in indexes if index is not None), default=1)


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
