"""Signals that ask a run to write a checkpoint after the current step and to end.

| Signal | Sent by | Exit status |
| --- | --- | --- |
| USR1 | a batch system before the time limit (`sbatch --signal=USR1@120`) | 75: start the same command again |
| TERM | preemption, `scancel`, `kubectl delete`, the deepspeed launcher | 143, as for any process that TERM ends |
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medalign.errors import Preempted, Stopped, Terminated

log = logging.getLogger("medalign")
REQUESTS: dict[signal.Signals, type[Stopped]] = {signal.SIGUSR1: Preempted, signal.SIGTERM: Terminated}


class StopSignals:
    """What this process has received so far. Signals only set a flag; the trainer asks for it after each step."""

    def __init__(self) -> None:
        self._received: set[type[Stopped]] = set()
        self._since = 0.0

    @property
    def request(self) -> type[Stopped] | None:
        """The request that this process has received, or None. TERM outranks USR1."""
        return max(self._received, key=lambda request: request.status, default=None)

    @property
    def seconds(self) -> float:
        """Seconds since the first signal."""
        return time.monotonic() - self._since

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        self._since = self._since or time.monotonic()
        self._received.add(REQUESTS[signal.Signals(number)])


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Collect the signals that arrive inside the context; outside of the main thread there are none.

    A step, a validation or a checkpoint is not interrupted by them.
    """
    received = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        log.info("outside of the main thread: USR1 and TERM end the process at once")
        yield received
        return
    before = {number: signal.signal(number, received.receive) for number in REQUESTS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Let this process end with its own exit status.

    When the first rank has ended, `srun --kill-on-bad-exit` and the deepspeed launcher send TERM to the others.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Deliver the signals after the context. Processes that start inside it are safe until `shield_worker` runs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(worker: int) -> None:
    """Let a loader's process outlive the signals that a batch system sends to every process of a job.

    The trainer still needs its batches, or at least must not fail because a worker is lost. Only TERM from the trainer
    itself ends the worker. Start workers inside `hold_stop_signals`.

    Args:
        worker: number of the worker; the form of torch's `worker_init_fn`.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # A signal that is pending swallows the next of its kind: take what arrived during the start before the trainer's.
    while signal.SIGTERM in signal.sigpending():
        _end_if_from_trainer()
    threading.Thread(target=_watch_for_trainer, daemon=True).start()


def _watch_for_trainer() -> None:
    while True:
        _end_if_from_trainer()


def _end_if_from_trainer() -> None:
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
        os._exit(0)
