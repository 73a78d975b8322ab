"""Whether a run may be resumed with the settings, the data and the ZeRO stage that are given now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from medalign import config as settings
from medalign.checkpoint import state
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.errors import ConfigError

log = logging.getLogger("medalign")

_SECTIONS: Sequence[str] = ("run", "data", "teacher", "student", "losses", "train", "optimizer")
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


def require_same_run(config: Config, now: TrainState, found: Path, path: Path) -> None:
    """Check that a checkpoint belongs to these settings, this ZeRO stage and this data.

    Args:
        config: the settings of this start.
        now: the state of a run that begins with them.
        found: the checkpoint.
        path: config.yaml of the run.

    Raises:
        ConfigError: it does not; the message gives the first difference and the remedy.
    """
    engine = ""
    if path.is_file():
        written = settings.read(path)
        _require_same_settings(written, config, path)
        engine = f" {written.engine.deepspeed}"
    before = state.read_state(found)
    if before.stage not in (None, now.stage):
        raise ConfigError(
            f"{found} has ZeRO stage {before.stage}, but engine.deepspeed {config.engine.deepspeed} has stage "
            f"{now.stage}: a run keeps the stage it began with; restore --engine.deepspeed{engine}, or name a new "
            "folder with --run.dir"
        )
    if not before.data:
        log.warning("%s does not record its training data: whether data.train is the same is not checked", found)
    elif before.data != now.data:
        raise ConfigError(
            f"data.train is not what {found} was trained on: {'; '.join(before.data)} then, {'; '.join(now.data)} "
            "now. A run continues with the same shards, folders in the same order; restore them, or name a new folder "
            "with --run.dir"
        )


def _require_same_settings(before: Config, now: Config, path: Path) -> None:
    for section in _SECTIONS:
        for key, value in vars(getattr(now, section)).items():
            old, name = getattr(getattr(before, section), key), f"{section}.{key}"
            # A model's folder may have moved with everything above it; its own name stays.
            same = Path(old).name == Path(value).name if name in _MODELS else old == value
            by_epochs = name == "train.steps" and old is None  # then train.epochs is what differs
            if not same and not by_epochs and name not in _MAY_CHANGE:
                raise ConfigError(
                    f"{path} has {name} = {old}, but this command has {value}: a run continues with the settings it "
                    "began with; restore them, or name a new folder with --run.dir"
                )
