"""The losses on held-out shards while training, and which step is the best so far."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from medalign.contracts import Batch
from medalign.data.batches.loader import ValidationLoader
from medalign.errors import ConfigError, Stopped
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")


class Validation(Callback):
    """Logs `validation/loss/...` at intervals and records the step with the lowest of one loss in the run's state.

    Attach it on every rank, before `Checkpointing`, which keeps the checkpoint of that step. A request to stop ends a
    validation; the next start makes up for it.

    Args:
        interval: steps between two evaluations; the last step always has one.
        batches: this rank's part of the held-out samples.
        metric: the loss that decides which step is the best: `loss/total`, or `loss/NAME` of a term.
    """

    def __init__(self, interval: int, batches: ValidationLoader, metric: str = "loss/total") -> None:
        self.interval = interval
        self.batches = batches
        self.metric = metric

    def on_train_start(self, trainer: Trainer) -> None:
        """Make up for a validation that the previous start did not complete."""
        if trainer.state.step:
            self._evaluate_if_due(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Evaluate if an evaluation is due, and record the best step."""
        self._evaluate_if_due(trainer)

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        step = trainer.state.step
        due = step % self.interval == 0 or step == trainer.total_steps
        if not due or step == trainer.state.evaluated_step or trainer.stopping:
            return
        try:
            losses = trainer.step.evaluate(_Announced(self.batches, trainer))
        except Stopped as stopped:  # on all ranks
            trainer.stopping = type(stopped)
            return
        trainer.log({f"validation/{name}": value for name, value in losses.items()})
        if self.metric not in losses:
            raise ConfigError(f"train.best_metric {self.metric} was not computed; use one of {', '.join(losses)}")
        value, best = losses[self.metric], trainer.state.best_loss
        if best is None or value < best:
            trainer.state = replace(trainer.state, best_step=step, best_loss=value)
        trainer.state = replace(trainer.state, evaluated_step=step)
        best_step = trainer.state.best_step
        log.info("step %d: validation %s %.4g, the lowest is that of step %s", step, self.metric, value, best_step)


class _Announced:
    """Batches that call the hooks of the trainer's callbacks before each of them is read."""

    def __init__(self, batches: ValidationLoader, trainer: Trainer) -> None:
        self._batches, self._trainer = batches, trainer

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        for _ in range(len(self._batches)):
            self._trainer.progress("a batch of the validation", slow=True)
            self._trainer.call_hooks(lambda callback: callback.on_validation_batch(self._trainer))
            yield next(batches)
