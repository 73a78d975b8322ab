"""Which checkpoints of a run are kept."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from medalign.checkpoint.files import write_flushed
from medalign.checkpoint.state import read_state
from medalign.errors import CheckpointError
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Retention:
    """What is kept besides the checkpoint of the best step.

    Args:
        newest: how many of the newest checkpoints.
        interval: every checkpoint whose step is a multiple of this; 0 is none.
    """

    newest: int
    interval: int = 0

    def kept(self, steps: list[int]) -> set[int]:
        """Return which of these steps, in ascending order, keep their checkpoint."""
        multiples = {step for step in steps if self.interval and step % self.interval == 0}
        return multiples | set(steps[-self.newest :])


def prune(root: Path, newest: Path, retention: Retention, best_step: int | None, spike: int) -> None:
    """Remove the checkpoints that are no longer needed. Only rank 0 calls it.

    Checkpoints of later steps than `newest` are removed too: they were written before the run was resumed from an
    earlier one.

    Args:
        root: folder of all checkpoints.
        newest: the checkpoint that `latest` names.
        retention: what is kept up to `newest`.
        best_step: the checkpoint of this step is kept too.
        spike: the newest checkpoint before this step, and the one that was the best then, are kept too. A rewind would
            go back to it.
    """
    remove_later(root, CheckpointFolder(newest).step)
    checkpoints = CheckpointsFolder(root).by_step()
    kept = retention.kept(list(checkpoints)) | {best_step}
    before = [step for step in checkpoints if step < spike][-1:]
    kept |= {*before, *(_best_step(checkpoints[step]) for step in before if step not in kept)}
    for step, found in checkpoints.items():
        if step not in kept:
            _remove(found.path)


def remove_later(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, to which the run has gone back. Only rank 0 calls it."""
    for later, found in CheckpointsFolder(root).by_step().items():
        if later > step:
            log.warning(
                "removing %s: the run went back to an earlier checkpoint and is now at step %d", found.path, step
            )
            _remove(found.path)


def _best_step(checkpoint: CheckpointFolder) -> int | None:
    """Return the best step when this checkpoint was written; None if that cannot be read."""
    try:
        return read_state(checkpoint.path).best_step
    except CheckpointError:  # a rewind would not load it either
        return None


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("%s is no longer needed but cannot be removed", path)


def point_to_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, or remove it if that checkpoint does not exist.

    A failure is only a warning: the checkpoint itself is complete, and the next one tries again.
    """
    checkpoints = CheckpointsFolder(root)
    found = None if step is None else checkpoints.by_step().get(step)
    try:
        if found is None:
            checkpoints.best.unlink(missing_ok=True)
        else:
            write_flushed(checkpoints.best, found.path.name + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s)", checkpoints.best, error.strerror or error)
