"""Progress of a long job: a progress bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from medalign import distributed

log = logging.getLogger("medalign")


class ProgressReporter:
    """Context manager that reports the progress of a job and the remaining time on rank 0.

    In a terminal this is a progress bar. Elsewhere it logs one line at the start, after the first call of `add`, then
    every `interval` seconds, and at the end.

    Args:
        what: name of the job, at the start of every line.
        total: total number of units.
        unit: what is counted, such as "samples".
        interval: seconds between log lines.
        stream: where the progress bar is drawn; stderr by default.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        interval: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stderr
        self._what, self._total, self._unit = what, total, unit
        self._interval, self._clock = interval, clock
        self._done = 0
        shown = stream.isatty() and distributed.is_main()
        self._bar = tqdm(total=total, file=stream, dynamic_ncols=True, unit=unit, desc=what) if shown else None

    def __enter__(self) -> ProgressReporter:
        self._began, self._last_line = self._clock(), -math.inf
        self._log(f"{self._total} {self._unit}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._log(f"{self._done} of {self._total} {self._unit} in {duration(self._clock() - self._began)}")

    def reach(self, done: int) -> None:
        """Report how many units are done."""
        self.add(done - self._done)

    def add(self, count: int) -> None:
        """Report that `count` more units are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = self._clock()
        if self._done and self._done < self._total and now - self._last_line >= self._interval:
            left = (now - self._began) / self._done * (self._total - self._done)
            self._log(f"{self._done} of {self._total} {self._unit}, {duration(left)} left")
            self._last_line = now

    def _log(self, text: str) -> None:
        if self._bar is None and distributed.is_main():
            log.info("%s: %s", self._what, text)


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds (5:07), with hours if necessary (1:05:07)."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
