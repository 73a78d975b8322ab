"""Metrics in the terminal, or in the log of a batch job."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

from medalign.distributed import log
from medalign.observability.progress import duration
from medalign.observability.sinks import to_python_numbers


class ConsoleSink:
    """A progress bar in a terminal; elsewhere, such as in the log of a batch job, at most one line per interval.

    `tick` advances the progress bar at each step; `log` shows the latest metrics.

    Args:
        total: number of steps of the run.
        start: first step of this start of the run.
        bar: whether to draw a progress bar; by default only in a terminal.
        interval: minimum number of seconds between log lines.
        stream: where the progress bar is drawn; stderr by default.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        bar: bool | None = None,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stderr
        self._total, self._start, self._interval, self._clock = total, start, interval, clock
        self._began = clock()
        self._last_line = -math.inf
        self._pending: str | None = None
        shown = stream.isatty() if bar is None else bar
        self._bar = (
            tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, unit="step", desc="train")
            if shown
            else None
        )

    def tick(self, step: int) -> None:
        """Advance the progress bar to a completed step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        text = summary(to_python_numbers(values))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self.tick(step)
            return
        left = (self._clock() - self._began) / max(step - self._start, 1) * (self._total - step)
        self._pending = f"step {step}/{self._total}  {text}  left {duration(left)}"
        if self._clock() - self._last_line >= self._interval:
            self._flush()

    def close(self) -> None:
        """End the progress bar, and write the last line."""
        if self._bar is not None:
            self._bar.close()
        self._flush()

    def _flush(self) -> None:
        if self._pending:
            log.info(self._pending)
            self._last_line = self._clock()
        self._pending = None


def summary(values: Mapping[str, float]) -> str:
    """Format the main metrics on one line: every loss, the learning rate, the speed."""
    parts = [f"{name.removeprefix('loss/')} {values[name]:.4g}" for name in values if name.startswith("loss/")]
    if "optim/lr" in values:
        parts.append(f"lr {values['optim/lr']:.2e}")
    if "speed/samples_per_second" in values:
        parts.append(f"{values['speed/samples_per_second']:.3g} samples/s")
    return "  ".join(parts)
