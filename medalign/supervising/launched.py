"""A launcher and all processes below it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from medalign.errors import ConfigError

_FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl
_LOOK = 0.1  # seconds between two looks at what has outlived a launcher
_KILLED = 10.0  # seconds in which the system removes processes that were killed


class Launched:
    """Runs a launcher's command in a process group of its own, and passes signals on to all of its processes.

    Use it inside `forwarding`, which makes processes whose parent has ended children of this process: torchrun gives
    each rank a session of its own, in which a rank outlives its launcher.

    Launchers do not pass USR1 on, and some end at once on TERM. So each process receives the signal itself. USR1 is
    ignored by all that have no handler for it, which are the launchers and, until they are ready, the ranks.

    TERM is not passed on to `srun`, which would kill the ranks: SLURM itself signals the ranks of its steps.

    Attributes:
        asked: the signal that this process has received; TERM and INT outrank USR1.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._by_srun = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []
        self._others: set[int] = set()  # children of this process that are not of the command

    def run(self, command: Sequence[str]) -> int:
        """Run the command to its end; returns its exit status, negative for a signal.

        Nothing of it remains: what has outlived a launcher that crashed is killed; after a request to end, it is waited
        for, since it may be writing a checkpoint.

        Raises:
            ConfigError: there is no such program.
        """
        self._by_srun = any(Path(word).name == "srun" for word in command)
        self._others = {child.pid for child in psutil.Process().children()}
        try:
            self._process = subprocess.Popen(command, process_group=0, preexec_fn=_ignore_usr1)
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started ({error.strerror or error}); give the launcher's command after --"
            ) from error
        for number in self._pending:  # arrived before the process was there
            self.receive(number)
        status = self._process.wait()
        while self.asked and (left := self._processes()):
            psutil.wait_procs(left, _LOOK)
        left = self._processes()
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, _KILLED)
        self._process = None
        return status

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal to this process."""
        if number != signal.SIGUSR1 or self.asked is None:
            self.asked = signal.Signals(number)
        if self._process is None:
            self._pending.append(number)
        elif number != signal.SIGTERM or not self._by_srun:
            for process in self._processes():
                with suppress(psutil.Error):
                    process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        """Return all processes of the command, from the bottom up."""
        found: list[psutil.Process] = []
        for child in psutil.Process().children():
            if child.pid not in self._others:
                found.append(child)
                with suppress(psutil.Error):  # it has ended meanwhile
                    found += child.children(recursive=True)
        return found[::-1]


@contextmanager
def forwarding(launched: Launched) -> Iterator[None]:
    """Pass USR1, TERM and INT on inside the context, and adopt processes whose parent has ended."""
    _adopt_orphans(True)
    before = {number: signal.signal(number, launched.receive) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _adopt_orphans(False)


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _ignore_usr1() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
