"""A checkpoint is complete or absent, whatever disk error occurs."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from medalign.checkpoint import state
from medalign.checkpoint.state import TrainState
from medalign.errors import CheckpointError


class FakeEngine:
    """Writes one file, or fails halfway through it as on a full disk."""

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.student = SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.zeros(1000))])
        self.loaded: list[Path] = []

    def save(self, folder: Path) -> None:
        (folder / "shard").write_text("half")
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def load(self, folder: Path, *, universal: bool = False) -> None:
        assert universal == folder.name.startswith(".partial-") and folder.is_dir()
        self.loaded.append(folder)


def export(folder: Path) -> None:
    folder.mkdir()
    (folder / "medalign.json").write_text("{}")


def at(step: int, ranks: int = 1) -> TrainState:
    return TrainState(step=step, samples=step * 4, ranks=ranks)


def test_save_keeps_the_newest_and_latest_names_the_last(tmp_path):
    for step in (5, 10, 15):
        state.save(FakeEngine(), tmp_path, at(step), 2, export)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000010", "step-000015"]
    newest = state.latest(tmp_path)
    assert newest == tmp_path / "step-000015"
    engine = FakeEngine()
    assert state.load(engine, newest) == at(15) and engine.loaded == [newest]


def test_the_best_checkpoint_is_named_and_never_removed(tmp_path):
    for step in (5, 10, 15, 20):
        now = replace(at(step), best_step=min(step, 10), best_loss=0.5)
        state.save(FakeEngine(), tmp_path, now, 1, export)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step-000010", "step-000020"]
    assert (tmp_path / "best").read_text() == "step-000010\n"
    assert state.load(FakeEngine(), tmp_path / "step-000020") == now


def test_a_best_checkpoint_that_is_gone_is_not_named(tmp_path):
    state.save(FakeEngine(), tmp_path, replace(at(10), best_step=10, best_loss=0.5), 1, export)
    state.save(FakeEngine(), tmp_path, replace(at(5), best_step=2, best_loss=0.7), 1, export)  # went back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


@contextlib.contextmanager
def room(size: int):
    """Limit files to `size` bytes, which is what a writer sees on a full disk or at the end of a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", ["torch", "safetensors", "plain"])
def test_real_writers_without_space_keep_the_earlier_checkpoint(tmp_path, writer):
    state.save(FakeEngine(), tmp_path, at(5), 2, export)

    def write(folder: Path) -> None:
        folder.mkdir()
        weights = {"w": torch.zeros(100_000)}
        if writer == "torch":
            torch.save(weights, folder / "state.pt")
        elif writer == "safetensors":
            save_file(weights, folder / "w.safetensors")
        else:
            (folder / "w").write_bytes(bytes(400_000))

    with room(50_000), pytest.raises(CheckpointError, match="step-000010 could not be written .*free disk space"):
        state.save(FakeEngine(), tmp_path, at(10), 2, write)
    assert state.latest(tmp_path) == tmp_path / "step-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_other_errors_are_not_reported_as_disk_errors(tmp_path):
    def broken(folder: Path) -> None:
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        state.save(FakeEngine(), tmp_path, at(5), 2, broken)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    state.save(FakeEngine(), tmp_path, at(5), 2, export)
    with pytest.raises(CheckpointError, match="step-000010 could not be written .No space left on device"):
        state.save(FakeEngine(full=True), tmp_path, at(10), 2, export)
    assert state.latest(tmp_path) == tmp_path / "step-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_missing_space_is_detected_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"no space left for checkpoint step-000005.*MiB more are needed"):
        state.save(FakeEngine(), tmp_path, at(5), 2, export)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_no_checkpoint(tmp_path):
    state.save(FakeEngine(), tmp_path, at(5), 2, export)
    (tmp_path / ".partial-step-000010").mkdir()
    assert state.latest(tmp_path) == tmp_path / "step-000005"
    state.save(FakeEngine(), tmp_path, at(10), 2, export)
    assert not list(tmp_path.glob(".partial-*"))


def test_a_dangling_pointer_names_the_remedy(tmp_path):
    state.save(FakeEngine(), tmp_path, at(5), 2, export)
    (tmp_path / "latest").write_text("step-000099\n")
    with pytest.raises(CheckpointError, match="step-000099, which does not exist; write step-000005 into"):
        state.latest(tmp_path)


def test_for_another_number_of_ranks_a_copy_is_converted(tmp_path, monkeypatch):
    folder = state.save(FakeEngine(), tmp_path, at(5, ranks=4), 2, export)
    monkeypatch.setattr(state, "to_universal", lambda source, target: shutil.copytree(source, target))
    engine = FakeEngine()
    assert state.load(engine, folder) == at(5, ranks=1)
    assert engine.loaded == [tmp_path / ".partial-universal-step-000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_a_full_disk_while_converting_keeps_the_checkpoint(tmp_path, monkeypatch):
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = state.save(FakeEngine(), tmp_path, at(5, ranks=4), 2, export)
    monkeypatch.setattr(state, "to_universal", full)
    with pytest.raises(CheckpointError, match="step-000005 could not be converted .*No space left.*free disk space"):
        state.load(FakeEngine(), folder)
    assert state.latest(tmp_path) == folder and state.read_state(folder).ranks == 4


@pytest.mark.parametrize("keep", [1, 2])
def test_what_latest_names_is_never_removed(tmp_path, keep):
    """`latest` is set back from 600 to 300: then 400 is the newest, and 600 was written before the reset."""
    for step in (300, 600):
        state.save(FakeEngine(), tmp_path, at(step), 2, export)
    (tmp_path / "latest").write_text("step-000300\n")
    state.save(FakeEngine(), tmp_path, at(400), keep, export)
    assert state.latest(tmp_path) == tmp_path / "step-000400"
    left = ["step-000400"] if keep == 1 else ["step-000300", "step-000400"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == left


def test_other_names_next_to_checkpoints_are_kept(tmp_path):
    (tmp_path / "step-best").mkdir(parents=True)
    state.save(FakeEngine(), tmp_path, at(5), 1, export)
    assert (tmp_path / "step-best").is_dir()


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 5, "of_the_future": 1}'])
def test_a_damaged_state_file_is_an_error(tmp_path, text):
    folder = state.save(FakeEngine(), tmp_path, at(5), 1, export)
    (folder / "progress.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-000005/progress\.json cannot be read"):
        state.read_state(folder)


def test_an_older_state_file_is_read(tmp_path):
    folder = state.save(FakeEngine(), tmp_path, at(5), 1, export)
    (folder / "progress.json").write_text('{"step": 5, "samples": 20, "ranks": 1, "skipped": 0, "truncated": 0}')
    assert state.read_state(folder) == at(5)


def test_torch_without_space_while_converting_is_reported(tmp_path, monkeypatch):
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        torch.save({"w": torch.zeros(100_000)}, target / "state.pt")

    folder = state.save(FakeEngine(), tmp_path, at(5, ranks=4), 2, export)
    monkeypatch.setattr(state, "to_universal", full)
    with room(50_000), pytest.raises(CheckpointError, match="step-000005 could not be converted .*free disk space"):
        state.load(FakeEngine(), folder)


def test_a_root_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step-000005 could not be written .File exists"):
        state.save(FakeEngine(), tmp_path / "checkpoints", at(5), 1, export)


def test_no_checkpoint_is_none(tmp_path):
    assert state.latest(tmp_path / "none") is None
