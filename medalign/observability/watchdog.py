"""Ends a process that hangs, after the stacks of all its threads are written into the run's folder.

All ranks wait for the one that hangs, so all of them notice at about the same time. Each writes a report. The rank to
look at has none, or the least progress, or is the one that does not wait for the others.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from medalign import distributed
from medalign.distributed import log

STATUS = 124  # exit status, as that of the command `timeout`
_STDERR = 2  # the descriptor: it stays open where sys.stderr is replaced
_POLL = 1.0  # seconds
_GRACE = 3.0  # seconds between this rank's report and the verdict, in which the other ranks report too
_BACKSTOP = 30.0  # seconds more, after which C code that blocks all Python threads is ended


class _Report(NamedTuple):
    """The first line of a rank's report."""

    beats: int  # how often it has reported progress
    waits: bool  # whether it is in a collective operation, where ranks wait for each other
    text: str


class Watchdog:
    """Context manager with a thread that watches the progress of this rank.

    Args:
        folder: `rank-N.txt` is written here.
        end: ends the process with a status.
        on_hang: called before that with the message that says which rank the others wait for.
    """

    def __init__(
        self,
        folder: Path,
        end: Callable[[int], object] = os._exit,
        on_hang: Callable[[str], object] = lambda verdict: None,
    ) -> None:
        self._folder, self._end, self._on_hang = folder, end, on_hang
        self.before_end: Callable[[], object] = lambda: None  # called last, in the thread; it must not take long
        self._progress: tuple[int, str, float, float] = (0, "starting", time.monotonic(), 0.0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with suppress(OSError):  # a folder that cannot be written is reported when it is locked
            self._report_path.unlink()  # of an earlier start
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def beat(self, what: str, limit: float) -> None:
        """Report progress. Every rank must report the same steps.

        Args:
            what: what this rank does next.
            limit: seconds that it may take; 0 means unlimited.
        """
        self._progress = (self._progress[0] + 1, what, time.monotonic(), limit)
        if limit:
            faulthandler.dump_traceback_later(limit + _BACKSTOP, file=_STDERR, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()

    @property
    def _report_path(self) -> Path:
        return self._folder / f"rank-{distributed.rank()}.txt"

    def _watch(self) -> None:
        while not self._closed.wait(_POLL):
            beats, what, since, limit = self._progress
            if limit and time.monotonic() - since > limit and self._report(beats, what, since):
                return

    def _report(self, beats: int, what: str, since: float) -> bool:
        """Write this rank's report and end the process; False if it has advanced in the meantime."""
        seconds = time.monotonic() - since
        where = f"rank {distributed.rank()} ({socket.gethostname()}, pid {os.getpid()})"
        own = _Report(beats, _waits_for_ranks(), f"{where}: {what}, for {seconds:.0f} s")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._report_path.open("w", encoding="utf-8") as file:
                file.write(f"{own.beats} {int(own.waits)} {own.text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._report_path, error.strerror or error)
        if self._closed.wait(_GRACE):
            return True
        if self._progress[0] != beats:
            self._report_path.unlink(missing_ok=True)
            return False
        reports = self._read_reports() | {distributed.rank(): own}
        verdict = self._verdict(reports)
        self._on_hang(verdict)
        if distributed.rank() == min(reports):
            log.error("error: %s", verdict)
        else:
            time.sleep(_GRACE)  # once one rank has ended, the launcher kills the others
        self.before_end()
        self._end(STATUS)
        return True

    def _read_reports(self) -> dict[int, _Report]:
        """Return what each rank has reported; a report that a full disk has cut counts as none."""
        reports = {}
        for rank in range(distributed.world_size()):
            path = self._folder / f"rank-{rank}.txt"
            with suppress(OSError, ValueError):
                beats, waits, text = path.read_text(encoding="utf-8").partition("\n")[0].split(" ", 2)
                reports[rank] = _Report(int(beats), waits == "1", text)
        return reports

    def _verdict(self, reports: dict[int, _Report]) -> str:
        missing = [rank for rank in range(distributed.world_size()) if rank not in reports]
        first = min((report.beats, report.waits) for report in reports.values())
        behind = [report.text for report in reports.values() if (report.beats, report.waits) == first]
        if missing:
            names = ", ".join(map(str, missing))
            found = f"rank {names} does not answer: its process is stopped, or its node has failed"
        elif len(behind) < len(reports):
            found = f"the run waits for {'; '.join(behind)}"
        else:
            found = f"no rank is behind the others: {behind[0]}"
        return (
            f"the run hangs: {found}. The stacks of all ranks are in {self._folder}. The same command again continues; "
            "if the run was only slow, raise engine.step_timeout or engine.start_timeout"
        )


def _waits_for_ranks() -> bool:
    """Return whether the main thread is inside of torch.distributed. A GPU's queue hides that: then it is False."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if os.path.join("torch", "distributed") in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
