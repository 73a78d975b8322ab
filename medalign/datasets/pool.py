"""Run jobs in several processes and count what is done."""

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

_MAX_WORKERS = 8  # processes by default; a disk cannot supply more
_POLL = 0.3  # seconds between two reads of the count

_count: Any = None  # in a worker: the shared count of finished items
_stop: Any = None  # in a worker: set when all workers must end


def default_workers() -> int:
    """Return one process per core available to this process, at most 8."""
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))


def run_in_processes(
    job: Callable[[Any, Callable[[int], object]], None],
    jobs: Sequence[Any],
    workers: int | None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Run `job(item, report)` for each item of `jobs`, in this process if one worker is enough.

    The first error of a job ends the others and is raised.

    Args:
        job: calls `report(n)` when n more items are done.
        jobs: arguments of the job.
        workers: number of processes; None takes the default.
        progress: called with the total number of finished items.

    Raises:
        DataError: a process was killed.
    """
    workers = min(workers or default_workers(), len(jobs))
    if workers <= 1:
        _run_here(job, jobs, progress)
        return
    # spawn, because a forked process would inherit locks and threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (count, stop)) as pool:
        try:
            _watch([pool.submit(_work, job, one) for one in jobs], count, progress)
        except BrokenProcessPool as error:
            raise DataError("a converting process was killed (memory?); run the same command to continue") from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run_here(job: Callable[..., Any], jobs: Sequence[Any], progress: Callable[[int], object] | None) -> None:
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
    """Another job failed or the user interrupted; raised at the next report of this job."""


def _start(count: Any, stop: Any) -> None:
    """Initialize a worker. It leaves Ctrl-C to the parent process, and exits when the parent exits."""
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
