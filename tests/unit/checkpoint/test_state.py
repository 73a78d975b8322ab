"""The record of a run's progress in a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medalign.checkpoint.state import read_state
from medalign.errors import CheckpointError
from tests.unit.checkpoint.fakes import at, save


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 5, "of_the_future": 1}'])
def test_a_damaged_state_file_is_an_error(tmp_path, text):
    folder = save(tmp_path, at(5), 1)
    (folder / "progress.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-000005/progress\.json cannot be read"):
        read_state(folder)


def test_an_older_state_file_is_read(tmp_path):
    folder = save(tmp_path, at(5), 1)
    (folder / "progress.json").write_text('{"step": 5, "samples": 20, "ranks": 1, "skipped": 0, "truncated": 0}')
    assert read_state(folder) == at(5)


def test_every_field_is_read_back_exactly(tmp_path):
    now = replace(
        at(5), data=("one", "two"), losses=(0.1, 1 / 3), diverged=2, best_step=4, best_loss=0.2, evaluated_step=4
    )
    assert read_state(save(tmp_path, now)) == now
