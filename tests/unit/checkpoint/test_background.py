"""A checkpoint that is written during later steps is complete only after `finish`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from medalign.checkpoint.loading import find_whole, load
from medalign.errors import CheckpointError
from tests.unit.checkpoint.fakes import FakeEngine, at, export, save, writer


class Slow:
    """An export that waits until it is released."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, folder: Path) -> None:
        assert self.go.wait(20)
        export(folder)


def test_it_is_complete_once_it_is_finished(tmp_path):
    save(tmp_path, at(5))
    slow = Slow()
    background = writer(tmp_path, 2, slow)
    background.begin(at(10))
    assert background.pending and not background.is_written()
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    slow.go.set()
    assert background.finish() == tmp_path / "step-000010"
    assert not background.pending
    assert find_whole(tmp_path) == tmp_path / "step-000010"
    assert load(FakeEngine(), tmp_path / "step-000010") == at(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005", "step-000010"]


def test_it_can_be_asked_whether_all_is_written(tmp_path):
    background = writer(tmp_path)
    background.begin(at(5))
    background.abandon()  # waits for the thread
    assert not background.pending and background.is_written()
    assert find_whole(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".partial-step-000005"]
    save(tmp_path, at(10))
    assert not list(tmp_path.glob(".partial-*"))


def test_a_disk_that_fills_meanwhile_is_reported_by_finish(tmp_path):
    save(tmp_path, at(5))
    background = writer(tmp_path, engine=FakeEngine(full=True))
    background.begin(at(10))
    with pytest.raises(CheckpointError, match="step-000010 could not be written .No space left on device"):
        background.finish()
    assert not background.pending
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]
    assert find_whole(tmp_path) == tmp_path / "step-000005"
