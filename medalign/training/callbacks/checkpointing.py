"""Checkpoints at intervals, at the last step, and wherever the validation loss is the lowest so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from medalign.checkpoint.state import TrainState
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")


class Checkpointing(Callback):
    """Writes checkpoints. Attach it on every rank, after the callbacks that decide what is best.

    Args:
        interval: steps between two checkpoints; the last step, the best one and a request to stop have one too.
        save: writes the checkpoint of a state and returns its folder; called on every rank.
    """

    def __init__(self, interval: int, save: Callable[[TrainState], Path]) -> None:
        self.interval = interval
        self.save = save

    def on_train_start(self, trainer: Trainer) -> None:
        """Record a validation that was made up for."""
        if trainer.state != trainer.begun:
            self._write(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Write a checkpoint if one is due, and call the hooks `on_checkpoint`."""
        state = trainer.state
        asked = state.step in (trainer.total_steps, state.best_step) or trainer.stopping is not None
        if asked or state.step % self.interval == 0:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        folder = self.save(trainer.state)
        log.info("step %d: checkpoint written in %.1f s", trainer.state.step, time.perf_counter() - began)
        trainer.call_hooks(lambda callback: callback.on_checkpoint(trainer, folder))
        trainer.agree_to_stop()  # a signal that arrived meanwhile: the run must not take another step for it
