"""The trainer calls the hooks of its callbacks in order, and knows none of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medalign import config
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.errors import CheckpointError, ConfigError, DataError, Preempted, Stopped, Terminated
from medalign.training.callbacks import Callback, Checkpointing, Profiler, Validation, checkpointing
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


def test_hooks_are_called_in_order():
    recorder = Recorder()
    state = build(recorder, Checkpointing(2, lambda now: Path(f"step-{now.step}"))).fit()
    assert state.step == 3
    assert recorder.calls == [
        ("train start", 0),
        ("step start", 0),
        ("step end", 1),
        ("step start", 1),
        ("log", 2, "loss/total"),
        ("step end", 2),
        ("checkpoint", 2, "step-2"),
        ("step start", 2),
        ("log", 3, "loss/total"),
        ("step end", 3),
        ("checkpoint", 3, "step-3"),
        ("train end", 3),
    ]


def test_a_resumed_run_takes_the_remaining_steps_and_a_finished_one_none():
    recorder = Recorder()
    build(recorder, step=2).fit()
    assert [call for call in recorder.calls if call[0] == "step end"] == [("step end", 3)]
    finished = Recorder()
    build(finished, step=3).fit()
    assert finished.calls == [("train start", 3), ("train end", 3)]


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


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(caplog):
    saved = Saved(1, 2)
    assert build(Checkpointing(2, saved), steps=6).fit().step == 6
    assert saved.steps == [6]
    assert caplog.text.count("The run continues") == 2 and "step 2: " in caplog.text and "step 4: " in caplog.text


def test_the_last_checkpoint_is_tried_again(caplog, monkeypatch):
    monkeypatch.setattr(checkpointing, "RETRY_SECONDS", 0.01)
    saved = Saved(1, 2, 3)
    build(Checkpointing(100, saved, retry_minutes=1), steps=2).fit()
    assert saved.steps == [2] and caplog.text.count("is tried again in") == 3


def test_the_last_checkpoint_is_an_error_in_the_end(monkeypatch):
    monkeypatch.setattr(checkpointing, "RETRY_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match="free disk space, then run the same command again"):
        build(Checkpointing(100, Saved(*range(1, 1000)), retry_minutes=0.001), steps=2).fit()


def test_a_start_that_is_asked_to_stop_does_not_wait_for_the_disk():
    with pytest.raises(CheckpointError, match="then run the same command again"):
        build(Stopping(1), Checkpointing(100, Saved(1), retry_minutes=60), steps=2).fit()


@pytest.mark.parametrize(("kind", "name", "status"), [(Preempted, "SIGUSR1", 75), (Terminated, "SIGTERM", 143)])
def test_a_request_to_stop_ends_the_run_after_the_step_with_a_checkpoint(kind, name, status):
    saved = Saved()
    with pytest.raises(kind, match=f"{name}: stopped after step 2 with a checkpoint; the run has 6 steps") as raised:
        build(Stopping(2, kind), Checkpointing(100, saved), steps=6).fit()
    assert saved.steps == [2] and raised.value.status == status


def test_a_request_before_the_first_step_takes_none_and_saves_nothing():
    saved = Saved()
    with pytest.raises(Preempted, match="stopped before the first step"):
        build(Stopping(-1), Checkpointing(100, saved), steps=6, step=3).fit()
    assert saved.steps == []


def test_a_request_that_arrives_while_saving_takes_no_further_step():
    stopping = Stopping(100)

    def save(state: TrainState) -> Path:
        stopping.step = 0
        saved(state)
        return Path()

    saved = Saved()
    with pytest.raises(Preempted, match="after step 2"):
        build(stopping, Checkpointing(2, save), steps=6).fit()
    assert saved.steps == [2]


def test_a_validation_that_was_cut_short_is_made_up_for():
    """Step 4 is the best one and the last: the next start evaluates it and writes its checkpoint again."""
    saved, recorder = Saved(), Recorder()
    callbacks = (Validation(2, range(3)), recorder, Checkpointing(100, saved))
    with pytest.raises(Terminated, match="after step 4"):
        build(Stopping(4, Terminated, in_validation=True), *callbacks, steps=4, log=100, validation=[3.0, 2.0]).fit()
    assert [(state.step, state.evaluated_step, state.best_step) for state in saved.states] == [(2, 2, 2), (4, 2, 2)]

    trainer = build(*callbacks, steps=4, log=100, validation=[2.0])
    trainer.state = trainer.begun = saved.states[-1]
    assert trainer.fit().best_step == 4
    assert [(state.step, state.evaluated_step, state.best_step) for state in saved.states[2:]] == [(4, 4, 4)]
    logged = [call[1] for call in recorder.calls if call[0] == "log" and call[2] == "validation/loss/total"]
    assert logged == [2, 4]


def test_an_exception_reaches_every_callback_and_the_caller():
    def batches():
        yield [tiny.batch()]
        raise DataError("a shard is lost")

    recorder = Recorder()
    with pytest.raises(DataError, match="a shard is lost"):
        build(recorder, batches=batches()).fit()
    assert recorder.calls[-1] == ("exception", 1, "a shard is lost")


def test_the_best_step_has_a_checkpoint_beside_those_at_intervals():
    saved: list[TrainState] = []

    def save(now: TrainState) -> Path:
        saved.append(now)
        return Path()

    recorder = Recorder()
    trainer = build(
        Validation(2, []), recorder, Checkpointing(5, save), steps=9, log=100, validation=[3.0, 2.0, 2.5, 2.0, 4.0]
    )
    state = trainer.fit()
    logged = [call for call in recorder.calls if call[0] == "log"]
    assert [step for _, step, name in logged if name == "validation/loss/total"] == [2, 4, 6, 8, 9]
    assert [now.step for now in saved] == [2, 4, 5, 9]  # better at 2 and 4; 5 by interval; the last
    assert (state.best_step, state.best_loss) == (4, 2.0)
    assert [now.best_step for now in saved] == [2, 4, 4, 4]


@pytest.mark.parametrize(("steps", "traced"), [(8, 2), (4, 1), (1, 1)])
def test_a_trace_is_written_however_short_the_run_is(tmp_path, caplog, steps, traced):
    with caplog.at_level("INFO", logger="medalign"):
        build(Profiler(2, tmp_path / "profile"), steps=steps).fit()
    assert json.loads((tmp_path / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert f"trace of {traced} steps" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.evaluate_every", "5"], "train.evaluate_every is 5, but there are no held-out shards"),
        (["--train.evaluate_every", "-1"], "train.evaluate_every.*-1"),
        (["--log.profile_steps", "-1"], "log.profile_steps.*-1"),
    ],
)
def test_settings_of_callbacks_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        config.load("phantom", ["--data.train", "c", *words])
