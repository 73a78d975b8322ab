"""Checkpoints that are either whole or absent; `medalign.run_folder` shows their files.

A checkpoint is written under a temporary name (`.partial-...`), flushed to disk, sealed with checksums, and renamed.
Only then does `latest` name it. Therefore `latest` names a complete checkpoint even if the run is killed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from medalign import distributed
from medalign.checkpoint.files import flush_tree, write_flushed
from medalign.checkpoint.integrity import seal
from medalign.checkpoint.state import TrainState, write_state
from medalign.engine.engine import Engine
from medalign.errors import CheckpointError, MedAlignError
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

log = logging.getLogger("medalign")
PARTIAL = ".partial-"
_MARGIN = 1 << 20  # bytes, for indices, JSON and file system blocks


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        engine: holds the student and the optimizer.
        root: folder of all checkpoints of the run.
        keep: how many of the newest checkpoints to keep.
        settings: the run's settings as YAML, which each checkpoint holds a copy of.
        export: writes the trained student into a folder; called on every rank.
    """

    engine: Engine
    root: Path
    keep: int
    settings: str
    export: Callable[[Path], None]

    def save(self, state: TrainState) -> Path:
        """Write the checkpoint of `state.step` and make it the latest. Every rank must call it.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: a rank cannot write. It is raised on every rank, and earlier checkpoints are not changed.
        """
        final = CheckpointsFolder(self.root).step(state.step).path
        partial = self.root / f"{PARTIAL}{final.name}"
        try:
            self._write(partial, final, state)
        except MedAlignError:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if distributed.is_main():
            _prune(self.root, final, self.keep, state.best_step)
            _point_to_best(self.root, state.best_step)
        return final

    def _write(self, partial: Path, final: Path, state: TrainState) -> None:
        def describe() -> None:
            write_state(partial, state)
            CheckpointFolder(partial).config.write_text(self.settings, encoding="utf-8")
            flush_tree(partial)

        failed = f"checkpoint {final} could not be written"
        remedy = "earlier checkpoints are complete; free disk space"
        for action in (
            on_main(lambda: self._prepare(partial)),
            lambda: self.engine.save(partial),
            lambda: self.export(CheckpointFolder(partial).export),
            on_main(describe),
        ):
            # When this context ends, every rank has written its part.
            with distributed.raise_on_all_ranks(), convert_write_errors(failed, remedy):
                action()
        with convert_write_errors(failed, remedy):
            seal(partial)
        with distributed.raise_on_all_ranks(), convert_write_errors(failed, remedy):
            on_main(lambda: _commit(partial, final, self.root))()

    def _prepare(self, partial: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(f"{PARTIAL}*"):
            shutil.rmtree(stale)
        missing = bytes_needed(self.engine) - shutil.disk_usage(self.root).free
        if missing > 0:
            raise CheckpointError(
                f"no space left for checkpoint {partial.name.removeprefix(PARTIAL)} in {self.root}: "
                f"{missing / 2**20:.1f} MiB more are needed; free disk space"
            )
        partial.mkdir()


def bytes_needed(engine: Engine) -> int:
    """Estimate the size of one checkpoint: fp32 weights and two moments, the working copy, and the export."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.student.parameters() if p.requires_grad)
    return trainable * (3 * 4 + 4 + 4) + _MARGIN


def on_main(action: Callable[[], None]) -> Callable[[], None]:
    """Return the action on rank 0, and an action that does nothing on the other ranks."""
    return action if distributed.is_main() else lambda: None


@contextmanager
def convert_write_errors(failed: str, remedy: str) -> Iterator[None]:
    """Convert write errors inside the context into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError, MedAlignError) as error:
        reason = _write_error_reason(error)
        if reason is None:
            raise
        raise CheckpointError(f"{failed} ({reason}); {remedy}") from error


def _write_error_reason(error: Exception) -> str | None:
    """Return the reason of a write error, or None for any other error."""
    if isinstance(error, RuntimeError):  # torch.save raises it for any disk error, without the reason
        writers = ("PytorchStreamWriter", "inline_container")
        return "torch could not write its file" if any(name in str(error) for name in writers) else None
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _commit(partial: Path, final: Path, root: Path) -> None:
    """Give the checkpoint its name, and let `latest` name it."""
    if final.exists():  # the run was resumed from an older checkpoint and reached this step again
        replaced = root / f"{PARTIAL}replaced-{final.name}"
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)  # the next checkpoint removes any remains
    else:
        partial.rename(final)
    write_flushed(CheckpointsFolder(root).latest, final.name + "\n")


def _point_to_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, or remove it if that checkpoint does not exist."""
    checkpoints = CheckpointsFolder(root)
    found = None if step is None else checkpoints.by_step().get(step)
    if found is None:
        checkpoints.best.unlink(missing_ok=True)
    else:
        write_flushed(checkpoints.best, found.path.name + "\n")


def _prune(root: Path, newest: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest up to `newest`, which `latest` names, and that of the best step.

    Checkpoints of later steps are removed too: they were written before the run was resumed from an earlier one.
    """
    whole = {step: found.path for step, found in CheckpointsFolder(root).by_step().items()}
    last = CheckpointFolder(newest).step
    kept = [step for step in whole if step <= last][-keep:]
    for step, path in whole.items():
        if step in kept or step == best_step:
            continue
        if step > last:
            log.warning("removing %s: the run was resumed from an earlier checkpoint and is now at step %d", path, last)
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s is no longer needed but cannot be removed", path)
