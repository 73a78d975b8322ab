"""A trace of some steps by torch.profiler, and a summary of where the time went."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import profile

from medalign import distributed
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")
SKIPPED = 3  # first steps of a start: they compile kernels and fill caches
ROWS = 30  # of the summary


class Profiler(Callback):
    """Traces `steps` steps, after the first few of this start. Writes a Chrome trace and a summary per rank.

    Args:
        steps: how many steps to trace; the trace ends with the run if that comes first.
        folder: `rank-N.json` is written here (open it with chrome://tracing or Perfetto), and `rank-N.txt`, a table of
            the operations that took the most time.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps = steps
        self.folder = folder
        self._first = self._last = 0
        self._profile: profile | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Compute the first and the last step of the trace."""
        self._first = min(trainer.state.step + SKIPPED, trainer.total_steps - 1)
        self._last = min(self._first + self.steps, trainer.total_steps)

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the trace at its first step."""
        if trainer.state.step == self._first:
            self._profile = profile()
            self._profile.start()

    def on_step_end(self, trainer: Trainer) -> None:
        """Write the trace after its last step."""
        if trainer.state.step == self._last:
            self._write()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop the trace without writing it."""
        if self._profile is not None:
            self._profile.stop()
        self._profile = None  # a rewind may follow

    def _write(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{distributed.rank()}.json"
        self._profile.export_chrome_trace(str(path))
        device = distributed.device().type
        table = self._profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        path.with_suffix(".txt").write_text(table, encoding="utf-8")
        self._profile = None
        log.info("trace of %d steps written to %s", self._last - self._first, path)
