"""The losses on held-out shards while training, and which step is the best so far."""

from __future__ import annotations

import logging
from dataclasses import replace

from medalign.data.batches.loader import ValidationLoader
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")


class Validation(Callback):
    """Logs `validation/loss/...` at intervals and records the step with the lowest total in the run's state.

    Attach it on every rank, before `Checkpointing`, which keeps the checkpoint of that step.

    Args:
        interval: steps between two evaluations; the last step always has one.
        batches: this rank's part of the held-out samples.
    """

    def __init__(self, interval: int, batches: ValidationLoader) -> None:
        self.interval = interval
        self.batches = batches

    def on_step_end(self, trainer: Trainer) -> None:
        """Evaluate if an evaluation is due, and record the best step."""
        step = trainer.state.step
        if step % self.interval and step != trainer.total_steps:
            return
        losses = trainer.step.evaluate(self.batches)
        trainer.log({f"validation/{name}": value for name, value in losses.items()})
        total, best = losses["loss/total"], trainer.state.best_loss
        if best is None or total < best:
            trainer.state = replace(trainer.state, best_step=step, best_loss=total)
        log.info("step %d: validation loss %.4g, the lowest is that of step %s", step, total, trainer.state.best_step)
