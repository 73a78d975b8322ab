"""Which checkpoint a run resumes from, and how it is loaded on any number of ranks.

DeepSpeed's shards are pickle files, so they are read only from the run's own folder.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medalign import distributed
from medalign.checkpoint.integrity import verify
from medalign.checkpoint.saving import PARTIAL, convert_write_errors, on_main
from medalign.checkpoint.state import TrainState, read_state
from medalign.engine.engine import Engine
from medalign.engine.universal import to_universal
from medalign.errors import CheckpointError, MedAlignError
from medalign.run_folder import CheckpointsFolder

log = logging.getLogger("medalign")
CONVERSION_SPEED = (
    30e6  # bytes of a checkpoint per second and rank, with thousands of parameters; docs/results/resume.md
)


def find_whole(root: Path, before: int | None = None) -> Path | None:
    """Return the checkpoint to resume from, or None if there is none. Every rank must call it.

    That is the one that `latest` names. If it is damaged, or if `latest` does not name a checkpoint, the newest one
    before it that matches its checksums is taken, with a warning that names both.

    Args:
        root: folder of all checkpoints of the run.
        before: only checkpoints of earlier steps than this one are considered.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used; on every rank.
    """
    names = ""
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            names = json.dumps(_candidates(CheckpointsFolder(root), before))
    candidates: list[str] = json.loads(distributed.broadcast_from_main(names))
    damages = []
    for name in candidates:
        try:
            verify(root / name)
        except MedAlignError as error:
            damages.append(f"{name}: {error}")
            log.warning("checkpoint %s is damaged and is not used: %s", root / name, error)
            continue
        if damages:
            log.warning("the run resumes from %s instead", root / name)
        return root / name
    if damages:
        raise CheckpointError(_no_whole_checkpoint(root, damages))
    return None


def _no_whole_checkpoint(root: Path, damages: Sequence[str]) -> str:
    return (
        f"none of the checkpoints in {root} can be used ({'; '.join(damages)}); restore one from a copy and write its "
        f"name into {CheckpointsFolder(root).latest}, or remove {root} to start again"
    )


def _candidates(checkpoints: CheckpointsFolder, before: int | None) -> list[str]:
    """Return the names of the checkpoints that a run may resume from, the preferred one first."""
    steps = checkpoints.by_step()
    if before is not None:
        return [folder.path.name for step, folder in sorted(steps.items(), reverse=True) if step < before]
    names = {step: folder.path.name for step, folder in sorted(steps.items(), reverse=True)}
    named = checkpoints.read_latest()
    if named is None:
        if checkpoints.latest.exists():
            log.warning("%s does not name a checkpoint: the newest whole one is taken", checkpoints.latest)
        elif names:
            log.warning("%s does not exist: the newest whole checkpoint is taken", checkpoints.latest)
        return list(names.values())
    found = [name for step, name in names.items() if step <= named.step]
    if named.step in steps:
        return found
    if not found:
        later = f"write {min(names.items())[1]} into {checkpoints.latest}, or " if names else ""
        raise CheckpointError(
            f"{checkpoints.latest} names {named.path.name}, which does not exist, and there is no earlier checkpoint; "
            f"{later}remove {checkpoints.path} to start again"
        )
    log.warning(
        "%s names %s, which does not exist: the newest whole checkpoint before it is taken",
        checkpoints.latest,
        named.path.name,
    )
    return found


def _no_progress(what: str, more: float) -> None:
    """Report nothing."""


def load(engine: Engine, folder: Path, progress: Callable[[str, float], None] = _no_progress) -> TrainState:
    """Restore the engine on any number of ranks. Every rank must call it.

    The order of the data does not depend on the number of ranks, so the run resumes with the batches that would have
    come next. On another number of ranks its results differ only by the order of sums over ranks and by the random
    numbers that dropout draws on each rank.

    Args:
        engine: receives the student's trainable parameters and the optimizer's state.
        folder: the checkpoint, which `find_whole` has checked.
        progress: called with each part of a conversion for another number of ranks, and with the seconds that it may
            take longer than other parts of a start; the same on every rank.

    Returns:
        Progress of the run, with the current number of ranks.

    Raises:
        CheckpointError: the checkpoint is of another version, or it cannot be rewritten for this number of ranks.
    """
    state = read_state(folder)
    if state.ranks == distributed.world_size():
        engine.load(folder)
        return state
    rewritten = folder.parent / f"{PARTIAL}universal-{folder.name}"
    _rewrite(folder, rewritten, state.ranks, progress)
    progress("loading the converted checkpoint", 0.0)
    engine.load(rewritten, universal=True)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(rewritten, ignore_errors=True)  # the next checkpoint removes any remains
    return replace(state, ranks=distributed.world_size())


def _rewrite(folder: Path, target: Path, ranks: int, progress: Callable[[str, float], None]) -> None:
    """Convert the checkpoint to the universal format. The ranks share the work.

    Raises:
        CheckpointError: a rank cannot write. It is raised on every rank.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = size / CONVERSION_SPEED / min(ranks, distributed.world_size())

    @contextmanager
    def agreed() -> Iterator[None]:
        progress("converting the checkpoint for another number of ranks", seconds)
        failed = f"{folder} could not be converted for another number of ranks"
        remedy = "free disk space, or start with the number of ranks that wrote it"
        with distributed.raise_on_all_ranks(), convert_write_errors(failed, remedy):
            yield

    began = time.monotonic()
    with agreed():
        on_main(lambda: _prepare(target, ranks, size, seconds))()
    with agreed():
        to_universal(folder, target, agreed)
    log.info("the checkpoint is converted (%.1f s)", time.monotonic() - began)


def _prepare(target: Path, ranks: int, size: int, seconds: float) -> None:
    """Report what the conversion needs, and check the space.

    It writes each value twice, once as the part of a rank and once joined, and a copy of the state of one rank.

    Args:
        target: the folder to write.
        ranks: how many ranks wrote the checkpoint.
        size: bytes of the checkpoint.
        seconds: how long the conversion is expected to take.
    """
    shutil.rmtree(target, ignore_errors=True)
    need, free = 2 * size + size // ranks, shutil.disk_usage(target.parent).free
    log.info(
        "the checkpoint was written by %d ranks: converting it for %d (about %.0f s; %.2f GiB of disk space until it "
        "is loaded, %.1f GiB are free)",
        ranks,
        distributed.world_size(),
        seconds,
        need / 2**30,
        free / 2**30,
    )
    if need > free:
        raise OSError(errno.ENOSPC, f"{(need - free) / 2**30:.2f} GiB more are needed")
