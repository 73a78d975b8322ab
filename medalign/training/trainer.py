"""The training loop. It takes steps and calls hooks; everything else that happens during a run is a callback."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from medalign import distributed
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import Batch
from medalign.errors import MedAlignError, Stopped
from medalign.observability.meters import Throughput
from medalign.stop_signals import REQUESTS
from medalign.training.progress import count_if_diverged, learning_rates, loss_limit, state_metrics, update_state
from medalign.training.schedule import rates, total_steps
from medalign.training.step import TrainStep

log = logging.getLogger("medalign")
_STOPS = tuple(REQUESTS.values())


class Callback:
    """Hooks of a training run. Each does nothing unless a subclass overrides it.

    Every rank calls the hooks at the same places, for its callbacks in their order. A callback whose hook communicates
    between ranks must be attached on all of them; one that only writes may be attached on rank 0 only.
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Called before the first step, and again before the first step after a rewind (`train.rewind_on_spike`)."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Called before the batch is read; `trainer.state.step` steps are done."""

    def on_batch(self, trainer: Trainer, micro_batches: Sequence[Batch]) -> None:
        """Called with this rank's part of the global batch, on the CPU, before the update."""

    def metrics(self, trainer: Trainer) -> Mapping[str, float]:
        """Return further metrics for the row of the step `trainer.state.step`, the same on every rank.

        Called on every rank before the row is logged. It must return the same names on every rank.
        """
        return {}

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after the update; `trainer.state` includes the step, and its metrics are logged if they are due."""

    def on_log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Called with metrics of the step `trainer.state.step`: means over all ranks, except for memory."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """Called when a checkpoint is complete in `folder`."""

    def on_validation_batch(self, trainer: Trainer) -> None:
        """Called before each batch of a validation is read. What it raises on one rank ends the validation on all."""

    def on_progress(self, trainer: Trainer, what: str, slow: bool) -> None:
        """Called when the run has advanced; `what` is what it does next, and `slow` whether that may take minutes."""

    def stop_request(self, trainer: Trainer) -> type[Stopped] | None:
        """Return why this rank asks the run to end after the current step, or None.

        Called after each update, and again after a checkpoint. The request of any rank counts for all.
        """
        return None

    def on_train_end(self, trainer: Trainer) -> None:
        """Called after the last step; not called if training ends with an exception."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Called when training ends with `error`, possibly on this rank only: it must not wait for other ranks.

        A rewind may follow a DivergedError, which all ranks raise.
        """

    def on_hang(self, trainer: Trainer) -> None:
        """Called in a thread of the watchdog before it ends the process, because the run hangs; it must not wait."""


class Trainer:
    """Runs the steps of a run and calls the hooks of its callbacks.

    Args:
        config: the whole configuration, with `train.steps` resolved.
        step: one optimizer step.
        batches: for each step from `state.step` on, this rank's micro-batches; the first is that of
            `state.next_batch`.
        state: where the run stands.
        callbacks: in the order in which their hooks are called.
    """

    def __init__(
        self,
        config: Config,
        step: TrainStep,
        batches: Iterator[list[Batch]],
        state: TrainState,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.step = step
        self.state = state
        self.callbacks = tuple(callbacks)
        self.begun = state
        self.stopping: type[Stopped] | None = None  # what all ranks have agreed on
        self.total_steps = total_steps(config.train)
        step.on_micro_batch = lambda: self.progress(f"a micro-batch of step {self.state.step + 1}")
        self._batches = batches
        self._speed = Throughput(step.engine.device)
        self._started = 0.0  # seconds of the clock at which the run would have begun without a pause

    def fit(self) -> TrainState:
        """Train up to the last step. Every rank must call it.

        Returns:
            Where the run stands at the end.

        Raises:
            DivergedError: the loss or the gradient of more than `train.max_diverged_steps` steps is not finite.
            DataError: too many samples cannot be used, or a shard is lost.
            CheckpointError: a checkpoint cannot be written.
            Stopped: a callback of any rank asked for it, and callbacks have written a checkpoint of the last step.
        """
        self._speed = Throughput(self.step.engine.device)
        self._started = time.perf_counter() - self.state.seconds
        try:
            self.agree_to_stop()
            self.call_hooks(lambda callback: callback.on_train_start(self))
            while self.state.step < self.total_steps and not self.stopping:
                self._take_step()
            if self.stopping:
                raise self.stopping(self._describe_stop(self.stopping))
            self.call_hooks(lambda callback: callback.on_train_end(self))
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self, error)
            raise
        return self.state

    def call_hooks(self, hook: Callable[[Callback], None]) -> None:
        """Call a hook of every callback. Every rank must call it."""
        for callback in self.callbacks:
            hook(callback)

    def log(self, values: Mapping[str, float]) -> None:
        """Hand metrics of the current step to the callbacks. Every rank must call it."""
        self.call_hooks(lambda callback: callback.on_log(self, values))

    def progress(self, what: str, slow: bool = False) -> None:
        """Tell the callbacks that the run has advanced. Every rank must call it."""
        self.call_hooks(lambda callback: callback.on_progress(self, what, slow))

    def agree_to_stop(self) -> None:
        """Set `stopping` to the request of any rank. Every rank must call it."""
        sums = distributed.sum_over_ranks({"requests": self._requests().to(self.step.engine.device)})
        self._set_stopping(sums["requests"].tolist())

    def _requests(self) -> torch.Tensor:
        """Return 1 for each kind of request that this rank has, in the order of `_STOPS`, and 0 for the others."""
        mine = {callback.stop_request(self) for callback in self.callbacks}
        return torch.tensor([float(kind in mine) for kind in _STOPS])

    def _set_stopping(self, counts: Sequence[float]) -> None:
        found = [kind for kind, count in zip(_STOPS, counts, strict=True) if count]
        self.stopping = max(found, key=lambda kind: kind.status, default=self.stopping)

    def _describe_stop(self, kind: type[Stopped]) -> str:
        name = next(number.name for number, request in REQUESTS.items() if request is kind)
        taken = self.state.step > self.begun.step
        what = f"stopped after step {self.state.step} with a checkpoint" if taken else "stopped before the first step"
        return f"{name}: {what}; the run has {self.total_steps} steps, and the same command again continues it"

    def _take_step(self) -> None:
        config, index = self.config, self.state.step
        self.call_hooks(lambda callback: callback.on_step_start(self))
        self.progress(f"reading the batch of step {index + 1}")
        distributed.seed_step(config.run.seed, index)
        with self._speed.waiting():
            micro_batches, fault = _next_batch_or_error(self._batches)
        self.progress(f"a micro-batch of step {index + 1}")
        self.call_hooks(lambda callback: callback.on_batch(self, micro_batches))
        limit = loss_limit(self.state, config.train.max_loss_ratio)
        losses = self.step(micro_batches, rates(index, config), fault, limit)
        done = index + 1
        device = self.step.engine.device
        self.state = count_if_diverged(self.state, losses, done, micro_batches, config.train)
        state, requests = update_state(self.state, config, done, micro_batches, self._requests().to(device))
        self._set_stopping(requests)
        self.state = replace(state, seconds=time.perf_counter() - self._started)
        self._speed.add(
            samples=sum(len(batch.keys) for batch in micro_batches),
            tokens=sum(int(batch.attention_mask.sum()) for batch in micro_batches),
        )
        if done % config.log.interval == 0 or done == self.total_steps:
            self.log(self._row(losses))
        self.progress(f"what follows step {done}", slow=True)
        self.call_hooks(lambda callback: callback.on_step_end(self))

    def _row(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the step that is done. Every rank must call it."""
        engine = self.step.engine
        rows = [losses, learning_rates(engine.rates()), self._speed.reduce(), state_metrics(self.state, engine.device)]
        rows += [callback.metrics(self) for callback in self.callbacks]
        return {name: value for row in rows for name, value in row.items()}


def _next_batch_or_error(batches: Iterator[list[Batch]]) -> tuple[list[Batch], MedAlignError | None]:
    """This rank's micro-batches, or the error instead of them; the step raises it on all ranks."""
    try:
        return next(batches), None
    except MedAlignError as error:
        return [], error
