"""A run that goes back gives up what it wrote after the checkpoint that it goes back to."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from medalign.checkpoint import loading
from medalign.checkpoint.state import TrainState
from medalign.config import TrainConfig
from medalign.errors import DivergedError
from medalign.training import rewind
from tests.unit.checkpoint.fakes import FakeEngine, at, save


class Diverging:
    """Ends in a spike where `ends` says: the step before the error, and the first and the last step of the spike."""

    def __init__(self, begun: TrainState, ends: list[tuple[int, tuple[int, ...]]]) -> None:
        self.state, self._ends = begun, ends

    def fit(self) -> TrainState:
        if not self._ends:
            return self.state
        step, spike = self._ends.pop(0)
        self.state = replace(self.state, step=step, spike=spike)
        raise DivergedError("the loss is not finite")

    def progress(self, what: str, slow: bool) -> None:
        pass


def go_back(root: Path, *ends: tuple[int, tuple[int, ...]], **words: Any) -> tuple[TrainState, list[str]]:
    left, engine = list(ends), FakeEngine()
    config = TrainConfig(rewind_on_spike=len(ends))
    state = rewind.fit(lambda now: nullcontext(Diverging(now, left)), at(0), engine, root, config, **words)
    return state, [path.name for path in engine.loaded]


def test_a_second_rewind_does_not_load_what_the_first_one_gave_up(tmp_path):
    """The checkpoint of step 6 lies in the first spike, and before the second one."""
    for step in (2, 4, 6):
        save(tmp_path, at(step), 10)
    state, loaded = go_back(tmp_path, (6, (5, 6)), (7, ()))
    assert loaded == ["step-000004", "step-000004"] and (state.step, state.rewinds) == (4, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002", "step-000004"]


def test_the_best_checkpoint_is_that_of_the_history_that_is_left(tmp_path):
    """Step 6 was the best, in the spike; before it, step 2 was, which is kept for a rewind to step 4."""
    for step, best, spike in ((2, 2, ()), (4, 2, ()), (6, 6, (5, 5))):
        save(tmp_path, replace(at(step), best_step=best, best_loss=1 / best, spike=spike), 1)
    assert (tmp_path / "best").read_text() == "step-000006\n"
    state, _ = go_back(tmp_path, (6, (5, 6)))
    assert (state.best_step, state.best_loss) == (2, 0.5)
    assert (tmp_path / "best").read_text() == "step-000002\n" and (tmp_path / "step-000002").is_dir()


def test_a_checkpoint_of_another_number_of_ranks_may_take_longer_to_load(tmp_path, monkeypatch):
    save(tmp_path, at(4, ranks=2))
    monkeypatch.setattr(loading, "to_universal", lambda source, target, agree: shutil.copytree(source, target))
    parts: list[str] = []
    go_back(tmp_path, (6, ()), progress=lambda what, more: parts.append(what))
    assert parts[-1] == "loading the converted checkpoint" and len(parts) == 3
