"""A captured state is written later, as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medalign.engine.capture import captured_saves


class Writer:
    """Like DeepSpeed's checkpoint engine."""

    def save(self, state_dict, path: str):
        torch.save(state_dict, path)


@pytest.mark.parametrize(("copy", "expected"), [(True, 1.0), (False, 2.0)])
def test_a_copy_keeps_the_values_of_its_moment(tmp_path, copy, expected):
    state = {"moments": [torch.ones(1000)], "step": 3}
    writer, path = Writer(), tmp_path / "state.pt"
    with captured_saves(writer, copy=copy) as files:
        writer.save(state_dict=state, path=str(path))
    assert not path.exists()
    state["moments"][0].fill_(2.0)
    assert [write() for write in files] == [path]
    found = torch.load(path, weights_only=True)
    assert found["step"] == 3 and torch.equal(found["moments"][0], torch.full((1000,), expected))
    writer.save(state, str(tmp_path / "at once"))
    assert Path(tmp_path / "at once").is_file()
