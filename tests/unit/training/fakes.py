"""A trainer whose steps do nothing, and callbacks that record, save and stop."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import torch

from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.errors import CheckpointError, Preempted, Stopped
from medalign.training.callbacks import Callback
from medalign.training.trainer import Trainer
from tests import tiny


class FakeStep:
    """Takes no step; the validation losses are given."""

    def __init__(self, validation: list[float]) -> None:
        rates = {"adapters": 0.1, "steering": 0.2}
        self.engine = SimpleNamespace(device=torch.device("cpu"), rates=lambda: rates)
        self.validation = iter(validation)

    def __call__(self, micro_batches, rates, fault, loss_limit):
        if fault is not None:
            raise fault
        return {"loss/total": 1.0, "optim/grad_norm": 0.5}

    def evaluate(self, batches):
        list(batches)
        return {"loss/total": next(self.validation)}


class Recorder(Callback):
    """Writes down every hook that it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_train_start(self, trainer):
        self.calls.append(("train start", trainer.state.step))

    def on_step_start(self, trainer):
        self.calls.append(("step start", trainer.state.step))

    def on_step_end(self, trainer):
        self.calls.append(("step end", trainer.state.step))

    def on_log(self, trainer, values):
        self.calls.append(("log", trainer.state.step, next(iter(values))))

    def on_checkpoint(self, trainer, folder):
        self.calls.append(("checkpoint", trainer.state.step, folder.name))

    def on_train_end(self, trainer):
        self.calls.append(("train end", trainer.state.step))

    def on_exception(self, trainer, error):
        self.calls.append(("exception", trainer.state.step, str(error)))


def build(*callbacks: Callback, steps: int = 3, log: int = 2, step: int = 0, validation=(), batches=None) -> Trainer:
    settings = Config()
    settings.train.steps, settings.log.interval = steps, log
    stream = itertools.repeat([tiny.batch()]) if batches is None else batches
    state = TrainState(step=step, samples=0, ranks=1)
    return Trainer(settings, FakeStep(list(validation)), stream, state, callbacks)


class Stopping(Callback):
    """Asks the run to stop once a step is done, or while the batches of a validation are read."""

    def __init__(self, step: int, kind: type[Stopped] = Preempted, in_validation: bool = False) -> None:
        self.step, self.kind, self.in_validation = step, kind, in_validation
        self.now = -1

    def on_step_start(self, trainer):
        self.now = trainer.state.step + 1

    def stop_request(self, trainer):
        return self.kind if self.now >= self.step and not self.in_validation else None

    def on_validation_batch(self, trainer):
        if self.in_validation and self.now >= self.step:
            raise self.kind("stopped during a validation")


class Saved:
    """Keeps the states that are saved; the given calls fail as on a full disk."""

    def __init__(self, *failing: int) -> None:
        self.states: list[TrainState] = []
        self.failing, self.calls = failing, 0

    def __call__(self, state: TrainState) -> Path:
        self.calls += 1
        if self.calls in self.failing:
            raise CheckpointError("checkpoint could not be written (No space left on device); free disk space")
        self.states.append(state)
        return Path(f"step-{state.step}")

    @property
    def steps(self) -> list[int]:
        return [state.step for state in self.states]
