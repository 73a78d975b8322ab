"""How far a long job is: a bar in a terminal, elsewhere lines of the log."""

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


class TrainState:
    """Shows how much of a job is done, and the time that is left. Only rank 0 shows it.

    In a terminal it is a bar. In any other stream it is one line at the start, after the first piece of work, then
    every `interval` seconds, and at the end.

    Args:
        what: name of the job, in front of every line.
        total: how many `unit` there are.
        stream: where a bar is drawn; default stderr.
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

    def __enter__(self) -> TrainState:
        self._began, self._last_line = self._clock(), -math.inf
        self._say(f"{self._total} {self._unit}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._say(f"{self._done} of {self._total} {self._unit} in {duration(self._clock() - self._began)}")

    def add(self, number: int) -> None:
        """So many more are done."""
        self._done += number
        if self._bar is not None:
            self._bar.update(number)
            return
        now = self._clock()
        if self._done and self._done < self._total and now - self._last_line >= self._interval:
            left = (now - self._began) / self._done * (self._total - self._done)
            self._say(f"{self._done} of {self._total} {self._unit}, {duration(left)} left")
            self._last_line = now

    def _say(self, text: str) -> None:
        if self._bar is None and distributed.is_main():
            log.info("%s: %s", self._what, text)


def duration(seconds: float) -> str:
    """Minutes and seconds as 5:07, with hours as 1:05:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
