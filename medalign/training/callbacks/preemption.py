"""A signal ends the run after the current step, with a checkpoint."""

from __future__ import annotations

import logging

from medalign.errors import Stopped
from medalign.stop_signals import StopSignals
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")


class StopOnSignal(Callback):
    """Hands on what this process has received. Attach it on every rank: the batch system may signal only one of them.

    Args:
        received: collects the signals.
    """

    def __init__(self, received: StopSignals) -> None:
        self._received = received

    def stop_request(self, trainer: Trainer) -> type[Stopped] | None:
        """Return what this process has received."""
        return self._received.request

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Log how long it took from the signal to the end of the step and its checkpoint."""
        if isinstance(error, Stopped) and self._received.request:
            log.warning("the run has stopped %.1f s after the signal", self._received.seconds)

    def on_validation_batch(self, trainer: Trainer) -> None:
        """Raise what this process has received, so that the ranks do not complete the validation."""
        if request := self._received.request:
            raise request("stopped during a validation")
