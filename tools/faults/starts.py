"""The ranks of one start, forked from a process that has imported everything: a start takes a second, not ten."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["medalign.run", "medalign.cli.train", "peft", "open_clip"])


class Start:
    """Runs `medalign WORDS` on some ranks of this machine.

    Args:
        words: the words after `medalign`.
        world: number of ranks.
        log: receives the output of all ranks.
    """

    def __init__(self, words: Sequence[str], world: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.began = time.time()
        self.log = log
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _CONTEXT.Process(target=_run_rank, args=(list(words), variables, log))
            process.start()
            self.ranks.append(process)

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to a rank that may have ended."""
        process = self.ranks[rank]
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)

    def ended(self) -> bool:
        """Return whether a rank has ended."""
        return any(not process.is_alive() for process in self.ranks)

    def wait(self, seconds: float) -> bool:
        """Wait until all ranks have ended; False if some rank has not."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in self.ranks)

    def kill(self) -> list[int | None]:
        """Kill the ranks that still run, as a launcher does; returns the exit status of each, negative for a signal."""
        for process in self.ranks:
            process.kill()
            process.join()
        return [process.exitcode for process in self.ranks]


def _run_rank(words: list[str], variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from medalign.cli.main import main

    sys.exit(main(words))
