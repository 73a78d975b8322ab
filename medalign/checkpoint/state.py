"""Checkpoints that are either whole or absent; `medalign.run_folder` shows their files.

A checkpoint is written under a temporary name (`.partial-...`), flushed to disk and renamed. Only then does `latest`
name it. Therefore `latest` names a complete checkpoint even if the run is killed. DeepSpeed's shards are pickle files,
so they are read only from the run's own folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from medalign import distributed
from medalign.engine.engine import Engine, to_universal
from medalign.errors import CheckpointError
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

log = logging.getLogger("medalign")
_PARTIAL = ".partial-"
_MARGIN = 1 << 20  # bytes, for indices, JSON and file system blocks


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. `step` is the number of completed steps and the index of the next one."""

    step: int
    samples: int
    ranks: int
    skipped: int = 0
    truncated: int = 0
    seconds: float = 0.0  # spent in the training loop of rank 0, checkpoints included, pauses between starts left out
    stage: int | None = None  # of ZeRO; None where it was not written down
    data: tuple[str, ...] = ()  # fingerprint of each training folder; empty where it was not written down
    best_step: int | None = None  # the step with the lowest loss on held-out shards; None where none was evaluated
    best_loss: float | None = None  # that loss


def bytes_needed(engine: Engine) -> int:
    """Estimate the size of one checkpoint: fp32 weights and two moments, the working copy, and the export."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.student.parameters() if p.requires_grad)
    return trainable * (3 * 4 + 4 + 4) + _MARGIN


def save(engine: Engine, root: Path, state: TrainState, keep: int, export: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `state.step` and make it the latest. Every rank must call it.

    Args:
        engine: holds the student and the optimizer.
        root: folder of all checkpoints of the run.
        state: progress of the run.
        keep: how many of the newest checkpoints to keep.
        export: writes the trained student into a folder; called on every rank.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a rank cannot write. It is raised on every rank, and earlier checkpoints are not changed.
    """
    final = CheckpointsFolder(root).step(state.step).path
    partial = root / f"{_PARTIAL}{final.name}"

    def commit() -> None:
        CheckpointFolder(partial).progress.write_text(json.dumps(asdict(state)) + "\n")
        _commit(partial, final, root)

    failed = f"checkpoint {final} could not be written"
    remedy = "earlier checkpoints are complete: free disk space, then run the same command again"
    try:
        for action in (
            _on_main(lambda: _prepare(engine, root, partial)),
            lambda: engine.save(partial),
            lambda: export(CheckpointFolder(partial).export),
            _on_main(commit),
        ):
            # When this context ends, every rank has written its part.
            with distributed.raise_on_all_ranks(), _convert_write_errors(failed, remedy):
                action()
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if distributed.is_main():
        _prune(root, final, keep, state.best_step)
        _point_to_best(root, state.best_step)
    return final


def _on_main(action: Callable[[], None]) -> Callable[[], None]:
    return action if distributed.is_main() else lambda: None


@contextmanager
def _convert_write_errors(failed: str, remedy: str) -> Iterator[None]:
    """Convert write errors inside the context into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
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


def latest(root: Path) -> Path | None:
    """Return the newest complete checkpoint, as rank 0 finds it, or None. Every rank must call it.

    Raises:
        CheckpointError: `latest` names a checkpoint that does not exist.
    """
    name = ""
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            name = _named(CheckpointsFolder(root))
    name = distributed.broadcast_from_main(name)
    return root / name if name else None


def _named(checkpoints: CheckpointsFolder) -> str:
    found = checkpoints.read_latest()
    if found is None:
        return ""
    if not found.progress.is_file():
        pointer = checkpoints.latest
        others = [one.path.name for one in checkpoints.by_step().values() if one.progress.is_file()]
        remedy = f"write {others[-1]} into {pointer}" if others else f"remove {checkpoints.path} to start again"
        raise CheckpointError(f"{pointer} names {found.path.name}, which does not exist; {remedy}")
    return found.path.name


def read_state(folder: Path) -> TrainState:
    """Where the run stood when the checkpoint was written. Raises CheckpointError if its file is damaged."""
    path = CheckpointFolder(folder).progress
    try:
        values = json.loads(path.read_text())
        return TrainState(**{**values, "data": tuple(values.get("data", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged or of another version; "
            f"write the name of an earlier checkpoint into {CheckpointsFolder(folder.parent).latest}"
        ) from error


def load(engine: Engine, folder: Path) -> TrainState:
    """Restore the engine on any number of ranks. Every rank must call it.

    The order of the data does not depend on the number of ranks, so the run resumes with the batches that would have
    come next. On another number of ranks its results differ only by the order of sums over ranks and by the random
    numbers that dropout draws on each rank.

    Args:
        engine: receives the student's trainable parameters and the optimizer's state.
        folder: the checkpoint.

    Returns:
        Progress of the run, with the current number of ranks.

    Raises:
        CheckpointError: the checkpoint is damaged, or it cannot be rewritten for this number of ranks.
    """
    state = read_state(folder)
    if state.ranks == distributed.world_size():
        engine.load(folder)
        return state
    log.info("the checkpoint was written by %d ranks: converting it for %d", state.ranks, distributed.world_size())
    rewritten = folder.parent / f"{_PARTIAL}universal-{folder.name}"
    _rewrite(folder, rewritten)
    engine.load(rewritten, universal=True)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(rewritten, ignore_errors=True)  # the next checkpoint removes any remains
    return replace(state, ranks=distributed.world_size())


def _rewrite(folder: Path, target: Path) -> None:
    """Convert the checkpoint to the universal format on rank 0 while the other ranks wait.

    Raises:
        CheckpointError: rank 0 cannot write. It is raised on every rank.
    """

    def write() -> None:
        shutil.rmtree(target, ignore_errors=True)
        to_universal(folder, target)

    failed = f"{folder} could not be converted for another number of ranks"
    remedy = "free disk space, or start with the number of ranks that wrote it"
    with distributed.raise_on_all_ranks(), _convert_write_errors(failed, remedy):
        _on_main(write)()


def _prepare(engine: Engine, root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(stale)
    missing = bytes_needed(engine) - shutil.disk_usage(root).free
    if missing > 0:
        raise CheckpointError(
            f"no space left for checkpoint {partial.name.removeprefix(_PARTIAL)} in {root}: "
            f"{missing / 2**20:.1f} MiB more are needed; free disk space, then run the same command again"
        )
    partial.mkdir()


def _commit(partial: Path, final: Path, root: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():  # the run was resumed from an older checkpoint and reached this step again
        shutil.rmtree(final)
    partial.rename(final)
    _point(CheckpointsFolder(root).latest, final.name)


def _point(pointer: Path, name: str) -> None:
    """Make the file `pointer` name a checkpoint, in one rename."""
    scratch = pointer.with_name(f".{pointer.name}")
    scratch.write_text(name + "\n")
    _flush(scratch)
    scratch.replace(pointer)
    _flush(pointer.parent)


def _point_to_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, or remove it if that checkpoint does not exist."""
    checkpoints = CheckpointsFolder(root)
    found = None if step is None else checkpoints.by_step().get(step)
    if found is None:
        checkpoints.best.unlink(missing_ok=True)
    else:
        _point(checkpoints.best, found.path.name)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(root: Path, newest: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest up to `newest`, which `latest` names, and that of the best step.

    Checkpoints of later steps are removed too: they were written before `latest` was set back to an earlier one.
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
