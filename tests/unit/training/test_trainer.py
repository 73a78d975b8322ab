"""The trainer calls the hooks of its callbacks in order, and knows none of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medalign import config
from medalign.checkpoint.state import TrainState
from medalign.errors import (
    ConfigError,
    DataError,
    Preempted,
    Terminated,
)
from medalign.training.callbacks import Checkpointing, Profiler, Validation
from tests import tiny
from tests.unit.training.fakes import FakeStep, Recorder, Saved, Stopping, build


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
    callbacks = (Validation(2, [tiny.batch()] * 3), recorder, Checkpointing(100, saved))
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


@pytest.mark.parametrize("first", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(first, caplog):
    state = build(Validation(1, []), steps=3, validation=[first, 2.0, float("nan")]).fit()
    assert (state.best_step, state.best_loss) == (2, 2.0)
    assert f"step 1: the validation loss is {first}, so the step cannot be the best" in caplog.text


def test_a_best_loss_that_an_earlier_version_has_stored_as_nan_counts_as_none():
    trainer = build(Validation(1, []), step=2, steps=3, validation=[2.0])
    trainer.state = trainer.begun = replace(trainer.state, best_step=1, best_loss=float("nan"), evaluated_step=2)
    assert trainer.fit().best_step == 3


def test_held_out_samples_that_cannot_be_used_are_reported_and_limited(caplog):
    """As in training: the limit is that for 100 samples at least."""
    bad = replace(tiny.batch(), skipped=("val/shard-000001.tar/k7: checksum differs",))
    build(Validation(1, [bad, tiny.batch()]), steps=1, validation=[1.0]).fit()
    assert "bad held-out sample replaced: val/shard-000001.tar/k7: checksum differs" in caplog.text
    assert "step 1: 1 of 4 held-out samples were replaced" in caplog.text
    with pytest.raises(DataError, match=r"2 of 4 held-out samples could not be used, more than data\.max_skip_f.*k7"):
        build(Validation(1, [bad, bad]), steps=1, validation=[1.0]).fit()


def test_the_best_step_is_that_of_the_chosen_loss():
    class Two(FakeStep):
        def evaluate(self, batches):
            value = next(self.validation)
            return {"loss/total": -value, "loss/language": value}

    trainer = build(Validation(1, [], "loss/language"), steps=3)
    trainer.step = Two([3.0, 1.0, 2.0])
    assert trainer.fit().best_step == 2
    with pytest.raises(ConfigError, match="train.best_metric loss/own was not computed; use one of loss/total"):
        build(Validation(1, [], "loss/own"), validation=[1.0]).fit()


@pytest.mark.parametrize(("steps", "traced"), [(8, 2), (4, 1), (1, 1)])
def test_a_trace_is_written_however_short_the_run_is(tmp_path, caplog, steps, traced):
    with caplog.at_level("INFO", logger="medalign"):
        build(Profiler(2, tmp_path / "profile"), steps=steps).fit()
    assert json.loads((tmp_path / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert "Self CPU time total" in (tmp_path / "profile" / "rank-0.txt").read_text()
    assert f"trace of {traced} steps" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.evaluate_every", "5"], "train.evaluate_every is 5, but there are no held-out shards"),
        (
            ["--checkpoint.keep_interval", "450"],
            "keep_interval is 450, but only each multiple of checkpoint.interval 300 has",
        ),
        (["--train.evaluate_every", "-1"], "train.evaluate_every.*-1"),
        (["--log.profile_steps", "-1"], "log.profile_steps.*-1"),
    ],
)
def test_settings_of_callbacks_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        config.load("phantom", ["--data.train", "c", *words])
