"""The record of a run's progress in a checkpoint."""

from __future__ import annotations

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
