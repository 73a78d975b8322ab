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
        interval: steps between two checkpoints; the last step always has one.
        save: writes the checkpoint of a state and returns its folder; called on every rank.
    """

    def __init__(self, interval: int, save: Callable[[TrainState], Path]) -> None:
        self.interval = interval
        self.save = save

    def on_step_end(self, trainer: Trainer) -> None:
        """Write a checkpoint if one is due, and call the hooks `on_checkpoint`."""
        state = trainer.state
        if state.step % self.interval and state.step not in (trainer.total_steps, state.best_step):
            return
        began = time.perf_counter()
        folder = self.save(state)
        log.info("step %d: checkpoint written in %.1f s", state.step, time.perf_counter() - began)
        trainer.call_hooks(lambda callback: callback.on_checkpoint(trainer, folder))
