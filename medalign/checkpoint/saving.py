"""Checkpoints that are either whole or absent; `medalign.run_folder` shows their files.

A checkpoint is written under a temporary name (`.partial-...`), flushed to disk, sealed with checksums, and renamed.
Only then does `latest` name it. Therefore `latest` names a complete checkpoint even if the run is killed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from medalign import distributed
from medalign.checkpoint.files import flush, flush_tree, write_flushed
from medalign.checkpoint.integrity import digests, seal
from medalign.checkpoint.retention import Retention, point_to_best, prune
from medalign.checkpoint.state import TrainState, write_state
from medalign.engine.engine import Engine
from medalign.errors import CheckpointError, MedAlignError
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

log = logging.getLogger("medalign")
PARTIAL = ".partial-"
_MARGIN = 1 << 20  # bytes, for indices, JSON and file system blocks


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose files are being written. `digests` has the SHA-256 of the files of this rank by name."""

    state: TrainState
    digests: Future[dict[str, str]]


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time.

    A thread writes the files of this rank, flushes them and computes their checksums. It does not communicate: the
    ranks agree that all files are written when they call `finish`, which completes the checkpoint.

    Args:
        engine: holds the student and the optimizer.
        root: folder of all checkpoints of the run.
        retention: which checkpoints to keep.
        settings: the run's settings as YAML, which each checkpoint holds a copy of.
        gather_export: copies the trained student into the host memory of rank 0, and returns what writes it into a
            folder; called on every rank.
    """

    def __init__(
        self,
        engine: Engine,
        root: Path,
        retention: Retention,
        settings: str,
        gather_export: Callable[[], Callable[[Path], None]],
    ) -> None:
        self._engine, self._root, self._retention = engine, root, retention
        self._settings, self._gather_export = settings, gather_export
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def save(self, state: TrainState) -> Path:
        """Write the checkpoint of `state.step` and make it the latest. Every rank must call it.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: a rank cannot write. It is raised on every rank, and earlier checkpoints are not changed.
        """
        self._begin(state, copy=False)
        return self.finish()

    def begin(self, state: TrainState) -> None:
        """Copy the state of this moment, and begin to write it. Every rank must call it, if none is pending.

        Raises:
            CheckpointError: a rank cannot write. It is raised on every rank, and earlier checkpoints are not changed.
        """
        self._begin(state, copy=True)

    @property
    def pending(self) -> bool:
        """Whether there is a checkpoint for `finish`."""
        return self._pending is not None

    def is_written(self) -> bool:
        """Return whether `finish` would not have to wait for any rank. Every rank must call it."""
        return not distributed.any_rank(self._pending is not None and not self._pending.digests.done())

    def finish(self) -> Path:
        """Wait until all ranks have written, and make the checkpoint the latest. Every rank must call it.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: a rank cannot write. It is raised on every rank, and earlier checkpoints are not changed.
        """
        assert self._pending is not None, "there is nothing to finish"
        pending, self._pending = self._pending, None
        final, partial = self._folders(pending.state)
        with self._removed_if_failed(partial):
            with _agreed(final):
                written = pending.digests.result()
            with _agreed(final):
                on_main(lambda: flush_tree(partial))()
            with convert_write_errors(*_failure(final)):
                seal(partial, written)
            with _agreed(final):
                on_main(lambda: _commit(partial, final, self._root))()
        if distributed.is_main():
            state = pending.state
            point_to_best(self._root, state.best_step)  # before the one that it has named is removed
            prune(self._root, final, self._retention, state.best_step, state.spike_start(state.step + 1))
        return final

    def abandon(self) -> None:
        """Wait until this rank no longer writes, and leave its checkpoint incomplete."""
        if self._pending is not None:
            wait([self._pending.digests])
        self._pending = None

    def _begin(self, state: TrainState, *, copy: bool) -> None:
        assert self._pending is None, "the last checkpoint must be finished first"
        final, partial = self._folders(state)
        with self._removed_if_failed(partial):
            with _agreed(final):
                on_main(lambda: self._prepare(partial))()
            with _agreed(final):
                files = self._engine.capture(partial, copy=copy)
            with _agreed(final):
                export = self._gather_export()
        self._pending = _Pending(state, self._thread.submit(self._write, state, files, export))

    def _write(
        self, state: TrainState, files: Sequence[Callable[[], Path]], export: Callable[[Path], None]
    ) -> dict[str, str]:
        """Write the files of this rank; return the SHA-256 of each. Runs in the thread."""
        final, partial = self._folders(state)
        folder = CheckpointFolder(partial)
        with convert_write_errors(*_failure(final)):
            paths = [write() for write in files]
            if distributed.is_main():
                export(folder.export)
                write_state(partial, state)
                folder.config.write_text(self._settings, encoding="utf-8")
                paths += [*folder.export.iterdir(), folder.progress, folder.config]
            for path in paths:
                flush(path)
            return digests(partial, paths)

    def _folders(self, state: TrainState) -> tuple[Path, Path]:
        """Return the folder of a checkpoint, and where it is written."""
        final = CheckpointsFolder(self._root).step(state.step).path
        return final, self._root / f"{PARTIAL}{final.name}"

    def _prepare(self, partial: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for stale in self._root.glob(f"{PARTIAL}*"):
            shutil.rmtree(stale)
        missing = bytes_needed(self._engine) - shutil.disk_usage(self._root).free
        if missing > 0:
            raise CheckpointError(
                f"no space left for checkpoint {partial.name.removeprefix(PARTIAL)} in {self._root}: "
                f"{missing / 2**20:.1f} MiB more are needed; free disk space"
            )
        partial.mkdir()

    @contextmanager
    def _removed_if_failed(self, partial: Path) -> Iterator[None]:
        """Remove what was written if a rank fails; its error is raised on all ranks inside the context."""
        try:
            yield
        except MedAlignError:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise


def bytes_needed(engine: Engine) -> int:
    """Estimate the size of one checkpoint: fp32 weights and two moments, the working copy, and the export."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.student.parameters() if p.requires_grad)
    return trainable * (3 * 4 + 4 + 4) + _MARGIN


def on_main(action: Callable[[], None]) -> Callable[[], None]:
    """Return the action on rank 0, and an action that does nothing on the other ranks."""
    return action if distributed.is_main() else lambda: None


@contextmanager
def _agreed(final: Path) -> Iterator[None]:
    """Raise the write error of a rank on all ranks. When the context ends, every rank has left it."""
    with distributed.raise_on_all_ranks(), convert_write_errors(*_failure(final)):
        yield


def _failure(final: Path) -> tuple[str, str]:
    return (
        f"checkpoint {final} could not be written",
        "earlier checkpoints are complete; free disk space, or make the folder writable",
    )


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
