"""The losses on held-out shards while training, and which step is the best so far."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from medalign import distributed
from medalign.checkpoint.state import TrainState
from medalign.contracts import Batch
from medalign.data.batches.loader import ValidationLoader
from medalign.data.batches.reader import check_skip_rate
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
        batches = _Announced(self.batches, trainer)
        try:
            losses = trainer.step.evaluate(batches)
        except Stopped as stopped:  # on all ranks
            trainer.stopping = type(stopped)
            return
        _check_skipped(trainer, batches)
        trainer.log({f"validation/{name}": value for name, value in losses.items()})
        if self.metric not in losses:
            raise ConfigError(f"train.best_metric {self.metric} was not computed; use one of {', '.join(losses)}")
        value = losses[self.metric]
        trainer.state = replace(_with_best(trainer.state, step, value), evaluated_step=step)
        best_step = trainer.state.best_step
        log.info("step %d: validation %s %.4g, the lowest is that of step %s", step, self.metric, value, best_step)


def _with_best(state: TrainState, step: int, loss: float) -> TrainState:
    """Return the state with this step as the best one if its loss is the lowest; NaN and infinity never are."""
    if not math.isfinite(loss):
        log.warning("step %d: the validation loss is %s, so the step cannot be the best", step, loss)
        return state
    lowest = state.best_loss is None or not math.isfinite(state.best_loss) or loss < state.best_loss
    return replace(state, best_step=step, best_loss=loss) if lowest else state


def _check_skipped(trainer: Trainer, batches: _Announced) -> None:
    """Report the held-out samples of all ranks that could not be used. Every rank must call it.

    Raises:
        DataError: they are more than `data.max_skip_fraction`; on all ranks.
    """
    for reason in batches.skipped:
        log.warning("bad held-out sample replaced: %s", reason)
    counts = torch.tensor([len(batches.skipped), batches.samples], device=trainer.step.engine.device)
    skipped, samples = map(int, distributed.sum_over_ranks({"counts": counts})["counts"].tolist())
    if skipped:
        log.warning("step %d: %d of %d held-out samples were replaced", trainer.state.step, skipped, samples)
    limit = trainer.config.data.max_skip_fraction
    check_skip_rate(skipped, samples, limit, batches.skipped, what="held-out samples")


class _Announced:
    """Batches that call the hooks of the trainer's callbacks before each of them is read, and count their samples."""

    def __init__(self, batches: ValidationLoader, trainer: Trainer) -> None:
        self._batches, self._trainer = batches, trainer
        self.samples = 0
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        for _ in range(len(self._batches)):
            self._trainer.progress("a batch of the validation", slow=True)
            self._trainer.call_hooks(lambda callback: callback.on_validation_batch(self._trainer))
            batch = next(batches)
            self.samples += len(batch.keys)
            self.skipped += batch.skipped
            yield batch
