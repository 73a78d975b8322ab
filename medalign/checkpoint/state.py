"""Checkpoints that are either whole or absent.

    checkpoints/
      latest              name of the newest whole checkpoint, replaced in one rename
      step-000500/
        state/            DeepSpeed's shards: what learns, the optimiser
        export/           the trained student, as `medalign export` gives it
        progress.json     step, samples, ranks, what was skipped and cut

A checkpoint is written under a name that nobody reads (`.partial-...`), flushed to disk, renamed, and only then
named by `latest`. Whatever kills the run, `latest` names a whole one. DeepSpeed's shards are its own pickle
format: they are read from the run's own folder alone, never from anywhere else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
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
class Progress:
    """Where a run stands. The next step to run is number `step`."""

    step: int
    samples: int
    ranks: int
    skipped: int = 0
    truncated: int = 0


def bytes_needed(engine: Engine) -> int:
    """Disk space of one checkpoint: fp32 weight and two moments, the working copy, and the export."""
    learning = sum(getattr(p, "ds_numel", p.numel()) for p in engine.student.parameters() if p.requires_grad)
    return learning * (3 * 4 + 4 + 4) + _SLACK


def save(engine: Engine, root: Path, progress: Progress, keep: int, export: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `progress.step` and make it the latest. Every rank must call it.

    Args:
        export: writes the trained student into a folder; called on every rank.

    Raises CheckpointError if the disk is full; then the checkpoints that were there are untouched.
    """
    final = root / f"step-{progress.step:06d}"
    partial = root / f"{_PARTIAL}{final.name}"
    _prepare(engine, root, partial)
    try:
        engine.save(partial)
        export(partial / "export")
        distributed.barrier()
        if distributed.is_main():
            (partial / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
            _commit(partial, final, root)
            _prune(root, keep)
    except (OSError, SafetensorError, RuntimeError) as error:
        trouble = _disk_trouble(error)
        if trouble is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({trouble}); "
            "the earlier ones are whole: free space, then start the same command again"
        ) from error
    distributed.barrier()
    return final


def _disk_trouble(error: Exception) -> str | None:
    """What a writer that failed has to say; None for an error that is no writer's."""
    if isinstance(error, RuntimeError):  # torch.save reports the disk so, and nothing else of it
        writers = ("PytorchStreamWriter", "inline_container")
        return "torch could not write its file" if any(name in str(error) for name in writers) else None
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, or None. Raises CheckpointError if `latest` names one that is gone."""
    pointer = root / "latest"
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text().strip()
    if not (folder / "progress.json").is_file():
        others = sorted(path.name for path in root.glob("step-*") if (path / "progress.json").is_file())
        remedy = f"write {others[-1]} into {pointer}" if others else f"remove {root} to start anew"
        raise CheckpointError(f"{pointer} names {folder.name}, which is not there; {remedy}")
    return folder


def read_progress(folder: Path) -> Progress:
    """Where the run stood when the checkpoint was written."""
    return Progress(**json.loads((folder / "progress.json").read_text()))


def load(engine: Engine, folder: Path) -> Progress:
    """Restore the engine, on any number of ranks; every rank must call it.

    The order of the data does not depend on the ranks, so a run goes on with the batches that it would have had. Its
    numbers are the same up to the order in which ranks are summed, and to what dropout draws on each rank.
    """
    progress = read_progress(folder)
    if progress.ranks == distributed.world():
        engine.load(folder)
        return progress
    log.info("the checkpoint is of %d ranks: rewriting it for %d", progress.ranks, distributed.world())
    rewritten = folder.parent / f"{_PARTIAL}universal-{folder.name}"
    _rewrite(folder, rewritten)
    engine.load(rewritten, universal=True)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(rewritten)
    return replace(progress, ranks=distributed.world())


def _rewrite(folder: Path, target: Path) -> None:
    """Rank 0 writes the universal form, the others wait; all raise CheckpointError if it cannot."""
    failure = 0
    if distributed.is_main():
        shutil.rmtree(target, ignore_errors=True)
        try:
            to_universal(folder, target)
        except OSError as error:
            failure = error.errno or errno.EIO
    failure = distributed.main_decides(failure)
    if failure:
        raise CheckpointError(
            f"{folder} could not be rewritten for another number of ranks ({os.strerror(failure)}); "
            "free space, or start with as many ranks as wrote it"
        )


def _prepare(engine: Engine, root: Path, partial: Path) -> None:
    missing = 0
    if distributed.is_main():
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale)
        missing = max(0, bytes_needed(engine) - shutil.disk_usage(root).free)
        if not missing:
            partial.mkdir()
    missing = distributed.main_decides(missing)  # all ranks stop together, none waits for the others
    if missing:
        raise CheckpointError(
            f"no space left for checkpoint {partial.name.removeprefix(_PARTIAL)} in {root}: "
            f"{missing / 2**20:.1f} MiB more are needed; free space, then start the same command again"
        )


def _commit(partial: Path, final: Path, root: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    pointer = root / ".latest"
    pointer.write_text(final.name + "\n")
    _flush(pointer)
    pointer.replace(root / "latest")
    _flush(root)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(root: Path, keep: int) -> None:
    whole = sorted(root.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    for old in whole[:-keep]:
        shutil.rmtree(old)
