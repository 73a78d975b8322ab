"""Checkpoints that are either whole or absent.

    checkpoints/
      latest              name of the newest whole checkpoint, replaced in one rename
      best                name of the checkpoint with the lowest loss on held-out shards, if any was evaluated
      step-000500/
        state/            DeepSpeed's shards: what learns, the optimizer
        export/           the trained student, as `medalign export` gives it
        progress.json     step, samples, ranks, what was skipped and cut

A checkpoint is written under a name that nobody reads (`.partial-...`), flushed to disk, renamed, and only then
named by `latest`. Whatever kills the run, `latest` names a whole one. DeepSpeed's shards are its own pickle
format: they are read from the run's own folder alone, never from anywhere else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from medalign import distributed
from medalign.engine.engine import Engine, to_universal
from medalign.errors import CheckpointError

log = logging.getLogger("medalign")
_PARTIAL = ".partial-"
_SLACK = 1 << 20  # bytes: indices, JSON, file system blocks


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. The next step to run is number `step`."""

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
    """Disk space of one checkpoint: fp32 weight and two moments, the working copy, and the export."""
    learning = sum(getattr(p, "ds_numel", p.numel()) for p in engine.student.parameters() if p.requires_grad)
    return learning * (3 * 4 + 4 + 4) + _SLACK


def save(engine: Engine, root: Path, progress: TrainState, keep: int, export: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `progress.step` and make it the latest. Every rank must call it.

    Args:
        export: writes the trained student into a folder; called on every rank.

    Raises CheckpointError, on every rank, if the disk of one is full; then the checkpoints that were there are
    untouched.
    """
    final = root / f"step-{progress.step:06d}"
    partial = root / f"{_PARTIAL}{final.name}"

    def commit() -> None:
        (partial / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
        _commit(partial, final, root)

    failed = f"checkpoint {final} could not be written"
    remedy = "the earlier ones are whole: free space, then start the same command again"
    try:
        for act in (
            _on_main(lambda: _prepare(engine, root, partial)),
            lambda: engine.save(partial),
            lambda: export(partial / "export"),
            _on_main(commit),
        ):
            with distributed.raise_on_all_ranks(), _disk(failed, remedy):  # at its end, every rank has written its part
                act()
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if distributed.is_main():
        _prune(root, final, keep, progress.best_step)
        _point_to_best(root, progress.best_step)
    return final


def _on_main(act: Callable[[], None]) -> Callable[[], None]:
    return act if distributed.is_main() else lambda: None


@contextmanager
def _disk(failed: str, remedy: str) -> Iterator[None]:
    """What a writer raises inside, as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        trouble = _disk_trouble(error)
        if trouble is None:
            raise
        raise CheckpointError(f"{failed} ({trouble}); {remedy}") from error


def _disk_trouble(error: Exception) -> str | None:
    """What a writer that failed has to say; None for an error that is no writer's."""
    if isinstance(error, RuntimeError):  # torch.save reports the disk so, and nothing else of it
        writers = ("PytorchStreamWriter", "inline_container")
        return "torch could not write its file" if any(name in str(error) for name in writers) else None
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint as rank 0 sees it, or None. Every rank must call it.

    Raises CheckpointError if `latest` names one that is gone.
    """
    name = ""
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            name = _named(root / "latest")
    name = distributed.broadcast_from_main(name)
    return root / name if name else None


def _named(pointer: Path) -> str:
    if not pointer.is_file():
        return ""
    root, name = pointer.parent, pointer.read_text().strip()
    if not (root / name / "progress.json").is_file():
        others = sorted(path.name for path in root.glob("step-*") if (path / "progress.json").is_file())
        remedy = f"write {others[-1]} into {pointer}" if others else f"remove {root} to start anew"
        raise CheckpointError(f"{pointer} names {name}, which is not there; {remedy}")
    return name


def read_state(folder: Path) -> TrainState:
    """Where the run stood when the checkpoint was written. Raises CheckpointError if its file is damaged."""
    path = folder / "progress.json"
    try:
        values = json.loads(path.read_text())
        return TrainState(**{**values, "data": tuple(values.get("data", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged or of another version; "
            f"write the name of an earlier checkpoint into {folder.parent / 'latest'}"
        ) from error


def load(engine: Engine, folder: Path) -> TrainState:
    """Restore the engine, on any number of ranks; every rank must call it.

    The order of the data does not depend on the ranks, so a run goes on with the batches that it would have had. Its
    numbers are the same up to the order in which ranks are summed, and to what dropout draws on each rank.
    """
    progress = read_state(folder)
    if progress.ranks == distributed.world_size():
        engine.load(folder)
        return progress
    log.info("the checkpoint is of %d ranks: rewriting it for %d", progress.ranks, distributed.world_size())
    rewritten = folder.parent / f"{_PARTIAL}universal-{folder.name}"
    _rewrite(folder, rewritten)
    engine.load(rewritten, universal=True)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(rewritten, ignore_errors=True)  # what stays, the next checkpoint clears away
    return replace(progress, ranks=distributed.world_size())


def _rewrite(folder: Path, target: Path) -> None:
    """Rank 0 writes the universal form, the others wait; all raise CheckpointError if it cannot."""

    def write() -> None:
        shutil.rmtree(target, ignore_errors=True)
        to_universal(folder, target)

    failed = f"{folder} could not be rewritten for another number of ranks"
    with distributed.raise_on_all_ranks(), _disk(failed, "free space, or start with as many ranks as wrote it"):
        _on_main(write)()


def _prepare(engine: Engine, root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(stale)
    missing = bytes_needed(engine) - shutil.disk_usage(root).free
    if missing > 0:
        raise CheckpointError(
            f"no space left for checkpoint {partial.name.removeprefix(_PARTIAL)} in {root}: "
            f"{missing / 2**20:.1f} MiB more are needed; free space, then start the same command again"
        )
    partial.mkdir()


def _commit(partial: Path, final: Path, root: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    _point(root, "latest", final.name)


def _point(root: Path, pointer: str, name: str) -> None:
    """Make the file `pointer` name a checkpoint, in one rename."""
    scratch = root / f".{pointer}"
    scratch.write_text(name + "\n")
    _flush(scratch)
    scratch.replace(root / pointer)
    _flush(root)


def _point_to_best(root: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of the best step, or nothing where that is gone."""
    name = "" if step is None else f"step-{step:06d}"
    if name and (root / name).is_dir():
        _point(root, "best", name)
    else:
        (root / "best").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(root: Path, newest: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the `keep` newest up to `newest`, which `latest` names, and that of the best step.

    Those beyond it go too: they are of a way that the run left when `latest` was set back.
    """
    whole = {int(path.name[5:]): path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)}
    last = int(newest.name[5:])
    kept = sorted(step for step in whole if step <= last)[-keep:]
    for step, path in whole.items():
        if step in kept or step == best_step:
            continue
        if step > last:
            log.warning("%s is removed: the run went back to before it, and is at step %d again", path, last)
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s is no longer needed and cannot be removed", path)
