"""Whether a run may be resumed with the settings, the data and the ZeRO stage that are given now."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from medalign import config as settings
from medalign.checkpoint.state import TrainState, read_state
from medalign.config import Config
from medalign.config.keys import flatten
from medalign.errors import ConfigError
from medalign.run_folder import CheckpointFolder

log = logging.getLogger("medalign")

_SECTIONS: Sequence[str] = ("run", "data", "teacher", "student", "losses", "train", "optimizer")
_MOVABLE: Sequence[str] = ("student.path", "student.vision_tower", "teacher.path", "teacher.also.path")
_MAY_CHANGE: Sequence[str] = (
    "run.dir",
    "data.train",
    "data.validation",
    "data.workers",
    "data.packing",
    "data.retries",
    "data.cache_dir",
    "data.cache_gib",
    "teacher.cache",
    "teacher.also.cache",
    "train.micro_batch_size",
    "train.evaluate_every",
    "train.max_diverged_steps",
    "train.rewind_on_spike",
    "student.gradient_checkpointing",
)


def require_same_run(config: Config, now: TrainState, found: Path, path: Path) -> None:
    """Check that a checkpoint belongs to these settings, this ZeRO stage and this data.

    The settings it was written with are those of its own copy, whose checksum was checked. The one in the run's folder
    is for the reader: if it is damaged, a warning gives its name, and this start replaces it.

    Args:
        config: the settings of this start.
        now: the state of a run that begins with them.
        found: the checkpoint.
        path: config.yaml of the run.

    Raises:
        ConfigError: it does not; the message gives the first difference and the remedy.
    """
    copy = CheckpointFolder(found).config
    written = settings.read(copy)
    _require_same_settings(written, config, copy)
    _warn_if_damaged(path, copy)
    before = read_state(found)
    if before.stage not in (None, now.stage):
        raise ConfigError(
            f"{found} has ZeRO stage {before.stage}, but engine.deepspeed {config.engine.deepspeed} has stage "
            f"{now.stage}: a run keeps the stage it began with; restore --engine.deepspeed "
            f"{written.engine.deepspeed}, or name a new folder with --run.dir"
        )
    if not before.data:
        log.warning("%s does not record its training data: whether data.train is the same is not checked", found)
    elif before.data != now.data:
        raise ConfigError(
            f"data.train is not what {found} was trained on: {'; '.join(before.data)} then, {'; '.join(now.data)} "
            "now. A run continues with the same shards, folders in the same order; restore them, or name a new folder "
            "with --run.dir"
        )


def continue_state(loaded: TrainState, now: TrainState) -> TrainState:
    """Return the state of a checkpoint with what this start knows of stage and data.

    If the held-out samples have changed, the best loss so far is forgotten, because losses on different samples cannot
    be compared.

    Args:
        loaded: the state of a checkpoint that belongs to this run.
        now: a state of this start.
    """
    held_out = now.held_out or loaded.held_out  # nothing is evaluated in this start
    state = replace(loaded, stage=now.stage, data=now.data, held_out=held_out)
    if loaded.best_step is None or loaded.held_out == held_out:
        return state
    if not loaded.held_out:
        log.warning("the checkpoint does not record its held-out data: whether data.validation is the same is unknown")
        return state
    log.warning(
        "data.validation is not what the best checkpoint, that of step %d, was chosen by (%s then, %s now): a new one "
        "is chosen from this step on",
        loaded.best_step,
        "; ".join(loaded.held_out),
        "; ".join(held_out),
    )
    return replace(state, best_step=None, best_loss=None, evaluated_step=None)


def _warn_if_damaged(path: Path, copy: Path) -> None:
    """Warn if config.yaml of the run cannot be read or lacks settings that the checkpoint's copy has."""
    try:
        settings.read(path)
        expected, found = (flatten(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in (copy, path))
        lost = sorted(expected.keys() - found.keys())
        reason = f"it lacks {', '.join(lost)}" if lost else ""
    except ConfigError as error:
        reason = str(error)
    if reason:
        log.warning("%s is damaged (%s): this start writes it again", path, reason)


def _require_same_settings(before: Config, now: Config, path: Path) -> None:
    old, new = _named(before), _named(now)
    for name in {**new, **old}:
        setting = re.sub(r"\[\d+\]", "", name)
        found, given = old.get(name, "none"), new.get(name, "none")
        # A model's folder may have moved with everything above it; its own name stays.
        same = _place(found) == _place(given) if setting in _MOVABLE else found == given
        by_epochs = name == "train.steps" and found is None  # then train.epochs is what differs
        if not same and not by_epochs and setting not in _MAY_CHANGE:
            raise ConfigError(
                f"{path} has {name} = {found}, but this command has {given}: a run continues with the settings it "
                "began with; restore them, or name a new folder with --run.dir"
            )


def _named(config: Config) -> dict[str, Any]:
    """Return the settings that are compared by name; those of a further teacher as `teacher.also[0].path`."""
    values = {name: section for name, section in asdict(config).items() if name in _SECTIONS}
    also = values["teacher"].pop("also")
    numbered = {f"teacher.also[{number}]": section for number, section in enumerate(also)}
    return {**flatten(values), **flatten(numbered)}


def _place(path: str) -> tuple[str, str]:
    """Return what a model's path must keep: its last name and what precedes the path, as in open_clip:ARCHITECTURE/."""
    before = re.match(r"open_clip:[^/]*/|\w+:|", path)
    assert before is not None  # the last alternative is empty
    return before[0], Path(path).name
