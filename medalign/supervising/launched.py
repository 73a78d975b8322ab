"""A launcher and all processes below it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from medalign.errors import ConfigError

_FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Launched:
    """Runs a launcher's command in a process group of its own, and passes signals on to all processes below it.

    Launchers do not pass USR1 on, and some end at once on TERM. So each process receives the signal itself. USR1 is
    ignored by all that have no handler for it, which are the launchers and, until they are ready, the ranks.

    In a SLURM job the batch system itself signals the ranks, and TERM would make `srun` kill them. There, only USR1 is
    passed on.

    Attributes:
        asked: the signal that this process has received; TERM and INT outrank USR1.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []

    def run(self, command: Sequence[str]) -> int:
        """Run the command to its end; returns its exit status, negative for a signal.

        Nothing of it remains: what has outlived a launcher that crashed is killed; after a request to end, it is waited
        for, since it may be writing a checkpoint.

        Raises:
            ConfigError: there is no such program.
        """
        try:
            self._process = subprocess.Popen(command, process_group=0, preexec_fn=_ignore_usr1)
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started ({error.strerror or error}); give the launcher's command after --"
            ) from error
        for number in self._pending:  # arrived before the process was there
            self.receive(number)
        status = self._process.wait()
        while self.asked and self._group_lives():
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None
        return status

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal to this process."""
        if number != signal.SIGUSR1 or self.asked is None:
            self.asked = signal.Signals(number)
        if self._process is None:
            self._pending.append(number)
        elif number == signal.SIGUSR1 or "SLURM_JOB_ID" not in os.environ:
            for process in _tree(self._process.pid):
                with suppress(psutil.Error):
                    process.send_signal(number)

    def _group_lives(self) -> bool:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def forwarding(launched: Launched) -> Iterator[None]:
    """Pass USR1, TERM and INT on inside the context."""
    before = {number: signal.signal(number, launched.receive) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_usr1() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it, from the bottom up."""
    try:
        root = psutil.Process(pid)
        return [*reversed(root.children(recursive=True)), root]
    except psutil.Error:
        return []
