"""Jobs over processes, with a count of what is done while they run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from medalign.errors import DataError

_MOST = 8  # processes by default: a disk feeds no more
_POLL = 0.3  # seconds between two looks at the count

_count: Any = None  # in a worker: the shared count of what all have done
_stop: Any = None  # in a worker: set when all shall end


def default_workers() -> int:
    """One process a core that this process may use, at most 8."""
    return min(_MOST, len(os.sched_getaffinity(0)))


def in_processes(
    job: Callable[[Any, Callable[[int], object]], None],
    jobs: Sequence[Any],
    workers: int | None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Do `job(one, report)` for each of `jobs`; where one worker is enough, in this process.

    A job calls `report(n)` for n more things done; `progress` is called with the sum over all. The first error of a
    job ends the rest and is raised. Raises DataError if a process was killed.
    """
    workers = min(workers or default_workers(), len(jobs))
    if workers <= 1:
        _here(job, jobs, progress)
        return
    # Fresh processes: a forked one would inherit locks and threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (count, stop)) as pool:
        try:
            _watch([pool.submit(_work, job, one) for one in jobs], count, progress)
        except BrokenProcessPool as error:
            raise DataError("a converting process was killed (memory?); the same command goes on from here") from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _here(job: Callable[..., Any], jobs: Sequence[Any], progress: Callable[[int], object] | None) -> None:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done)

    for one in jobs:
        job(one, report)


def _watch(waiting: list[Future[Any]], count: Any, progress: Callable[[int], object] | None) -> None:
    left = set(waiting)
    while left:
        finished, left = wait(left, timeout=_POLL, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        if progress:
            progress(count.value)


class _Stopped(Exception):
    """Another job failed or the user interrupted: this one ends at its next report."""


def _start(count: Any, stop: Any) -> None:
    """A worker begins. It leaves Ctrl-C to the parent, and ends with it, however that ends."""
    global _count, _stop
    _count, _stop = count, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Callable[..., Any], one: Any) -> None:
    job(one, _report)


def _report(more: int) -> None:
    if _stop.is_set():
        raise _Stopped
    with _count.get_lock():
        _count.value += more
