"""Checkpoints are tried again when the disk is full, and written while steps are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.checkpoint.state import TrainState
from medalign.errors import CheckpointError, DataError, DivergedError, Preempted
from medalign.training.callbacks import Callback, Checkpointing, Validation, checkpointing
from tests import tiny
from tests.unit.training.fakes import FakeStep, Recorder, Saved, Stopping, build


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


class Background(Saved):
    """Writes each checkpoint while the next `steps` steps are taken; the given calls of `finish` fail."""

    def __init__(self, steps: int, *failing: int) -> None:
        super().__init__(*failing)
        self.steps_needed, self.left = steps, 0
        self.state: TrainState | None = None
        self.events: list[tuple[str, int]] = []

    @property
    def pending(self) -> bool:
        return self.state is not None

    def begin(self, state: TrainState) -> None:
        assert self.state is None
        self.state, self.left = state, self.steps_needed
        self.events.append(("begin", state.step))

    def is_written(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def finish(self) -> Path:
        state, self.state = self.state, None
        self.events.append(("finish", state.step))
        return self(state)

    def abandon(self) -> None:
        self.state = None
        self.events.append(("abandon", 0))


def run_in_background(background: Background, steps: int, *callbacks: Callback, interval: int = 2, **words) -> Recorder:
    recorder, saved = Recorder(), Saved()
    build(recorder, *callbacks, Checkpointing(interval, saved, background=background), steps=steps, **words).fit()
    assert saved.steps == [steps]  # the run waits for the last one
    return recorder


@pytest.mark.parametrize("needed", [1, 2, 5])
def test_steps_are_taken_while_a_checkpoint_is_written(needed):
    """One at a time: the next one, and the last one of the run, wait for it."""
    background = Background(needed)
    recorder = run_in_background(background, 5)
    assert background.events == [("begin", 2), ("finish", 2), ("begin", 4), ("finish", 4)]
    calls = [call for call in recorder.calls if call[0] == "checkpoint"]
    assert calls == [
        ("checkpoint", 2 + min(needed, 2), "step-2"),
        ("checkpoint", 5, "step-4"),
        ("checkpoint", 5, "step-5"),
    ]


def test_a_checkpoint_that_fails_in_the_background_does_not_end_the_run(caplog):
    background = Background(1, 1)
    run_in_background(background, 5)
    assert background.steps == [4] and "step 2: checkpoint could not be written" in caplog.text
    assert caplog.text.count("The run continues") == 1


def test_a_request_to_stop_waits_for_the_pending_checkpoint_and_writes_its_own():
    background, saved = Background(100), Saved()
    with pytest.raises(Preempted, match="after step 3 with a checkpoint"):
        build(Stopping(3), Checkpointing(2, saved, background=background), steps=9).fit()
    assert background.steps == [2] and saved.steps == [3]


def test_the_pending_checkpoint_is_completed_only_if_all_ranks_raise(monkeypatch):
    """A loss that is not finite ends all ranks alike; a lost shard may be raised by one rank only."""

    def batches():
        yield from [[tiny.batch()]] * 2
        raise DataError("a shard is lost")

    lost = Background(100)
    with pytest.raises(DataError):
        build(Checkpointing(2, Saved(), background=lost), batches=batches(), steps=9).fit()
    assert lost.events == [("begin", 2), ("abandon", 0)]

    diverged = Background(100)
    trainer = build(Checkpointing(2, Saved(), background=diverged), steps=9)
    take = trainer.step.__call__
    losses = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(FakeStep, "__call__", lambda *words: take(*words[1:]) | {"loss/total": next(losses)})
    with pytest.raises(DivergedError):
        trainer.fit()
    assert diverged.events == [("begin", 2), ("finish", 2)]


@pytest.mark.parametrize("background", [True, False])
def test_the_best_step_remains_the_one_before_if_its_checkpoint_cannot_be_written(background):
    """Step 2 is the best but is not written, so that step 4, worse than 2 but better than 1, is the best one."""
    writer, saved = Background(1, 2), Saved(*(() if background else (2,)))
    hooks = (Validation(1, []), Checkpointing(100, saved, background=writer if background else None))
    trainer = build(*hooks, steps=5, validation=[3.0, 1.0, 3.5, 2.0, 2.5])
    state = trainer.fit()
    assert (state.best_step, state.best_loss) == (4, 2.0)
    written = writer.states + saved.states
    assert [(now.step, now.best_step) for now in written] == [(1, 1), (4, 4), (5, 4)]


def test_a_best_step_whose_checkpoint_cannot_be_begun_is_given_up(monkeypatch):
    writer = Background(1)

    def begin(state: TrainState) -> None:
        if state.step == 2:
            raise CheckpointError("no space left")
        Background.begin(writer, state)

    monkeypatch.setattr(writer, "begin", begin)
    hooks = (Validation(1, []), Checkpointing(100, Saved(), background=writer))
    assert build(*hooks, steps=3, validation=[3.0, 1.0, 3.5]).fit().best_step == 1
