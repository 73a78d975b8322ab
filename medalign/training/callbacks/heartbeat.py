"""The progress of the run for the watchdog."""

from __future__ import annotations

from medalign.observability.watchdog import Watchdog
from medalign.training.trainer import Callback, Trainer


class Heartbeat(Callback):
    """Reports progress to the watchdog of this rank. Attach it on every rank.

    Args:
        watchdog: ends the process if there is no progress.
        start_timeout: limit in seconds for the first step of a start, a checkpoint, and a batch of a validation.
        step_timeout: limit in seconds for reading the batch of a step, and for each of its micro-batches.
    """

    def __init__(self, watchdog: Watchdog, start_timeout: float, step_timeout: float) -> None:
        self._watchdog = watchdog
        self._start_timeout, self._step_timeout = start_timeout, step_timeout

    def on_train_start(self, trainer: Trainer) -> None:
        """Let the callbacks know if the run hangs."""
        self._watchdog.before_end = lambda: trainer.call_hooks(lambda callback: callback.on_hang(trainer))

    def on_progress(self, trainer: Trainer, what: str, slow: bool) -> None:
        """Start the time again."""
        slow = slow or trainer.state.step == trainer.begun.step  # the first step compiles kernels
        self._watchdog.beat(what, self._start_timeout if slow else self._step_timeout)
