"""A checkpoint is complete or absent, whatever disk error occurs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medalign.checkpoint import saving
from medalign.checkpoint.integrity import seal
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.retention import Retention
from medalign.errors import CheckpointError
from medalign.run_folder import CheckpointsFolder
from tests.unit.checkpoint.fakes import FakeEngine, at, room, save


def test_save_keeps_the_newest_and_latest_names_the_last(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000010", "step-000015"]
    newest = find_whole(tmp_path)
    assert newest == tmp_path / "step-000015"
    engine = FakeEngine()
    assert load(engine, newest) == at(15) and engine.loaded == [newest]


def test_the_best_checkpoint_is_named_and_never_removed(tmp_path):
    for step in (5, 10, 15, 20):
        now = replace(at(step), best_step=min(step, 10), best_loss=0.5)
        save(tmp_path, now, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step-000010", "step-000020"]
    assert (tmp_path / "best").read_text() == "step-000010\n"
    assert load(FakeEngine(), tmp_path / "step-000020") == now


def test_the_checkpoint_before_a_spike_is_kept_until_the_spike_is_over(tmp_path):
    """A rewind goes back to it, however few checkpoints are kept."""
    for step, spike in ((5, ()), (10, (8, 9)), (15, (8, 13)), (33, (8, 13))):
        save(tmp_path, replace(at(step), spike=spike), 1)
        names = sorted(path.name for path in tmp_path.glob("step-*"))
        assert names == (["step-000005", f"step-{step:06d}"] if step in (10, 15) else [f"step-{step:06d}"])


def test_a_kill_while_old_checkpoints_are_removed_leaves_best_a_checkpoint(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    save(tmp_path, replace(at(5), best_step=5, best_loss=0.5))
    monkeypatch.setattr(saving, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, replace(at(10), best_step=10, best_loss=0.4))
    assert (tmp_path / "best").read_text() == "step-000010\n"


def test_a_best_checkpoint_that_is_gone_is_not_named(tmp_path):
    save(tmp_path, replace(at(10), best_step=10, best_loss=0.5), 1)
    save(tmp_path, replace(at(5), best_step=2, best_loss=0.7), 1)  # went back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_a_best_checkpoint_that_cannot_be_named_is_a_warning(tmp_path, caplog):
    """On one rank only: an error would leave the others waiting."""
    (tmp_path / ".best").mkdir()
    assert save(tmp_path, replace(at(5), best_step=5, best_loss=0.5)) == tmp_path / "step-000005"
    assert "best cannot be written (Is a directory)" in caplog.text


@pytest.mark.parametrize("writer", ["torch", "safetensors", "plain"])
def test_real_writers_without_space_keep_the_earlier_checkpoint(tmp_path, writer):
    save(tmp_path, at(5))

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
        save(tmp_path, at(10), 2, write)
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_other_errors_are_not_reported_as_disk_errors(tmp_path):
    def broken(folder: Path) -> None:
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        save(tmp_path, at(5), 2, broken)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    save(tmp_path, at(5))
    with pytest.raises(CheckpointError, match="step-000010 could not be written .No space left on device"):
        save(tmp_path, at(10), engine=FakeEngine(full=True))
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_missing_space_is_detected_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"no space left for checkpoint step-000005.*MiB more are needed"):
        save(tmp_path, at(5))
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_no_checkpoint(tmp_path):
    save(tmp_path, at(5))
    (tmp_path / ".partial-step-000010").mkdir()
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    save(tmp_path, at(10))
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("keep", [1, 2])
def test_what_latest_names_is_never_removed(tmp_path, keep):
    """`latest` is set back from 600 to 300: then 400 is the newest, and 600 was written before the reset."""
    for step in (300, 600):
        save(tmp_path, at(step))
    (tmp_path / "latest").write_text("step-000300\n")
    save(tmp_path, at(400), keep)
    assert find_whole(tmp_path) == tmp_path / "step-000400"
    left = ["step-000400"] if keep == 1 else ["step-000300", "step-000400"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == left


def test_other_names_next_to_checkpoints_are_kept(tmp_path):
    (tmp_path / "step-best").mkdir(parents=True)
    save(tmp_path, at(5), 1)
    assert (tmp_path / "step-best").is_dir()


def test_a_root_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step-000005 could not be written .File exists"):
        save(tmp_path / "checkpoints", at(5), 1)


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, at(5))
    save(tmp_path, replace(at(5), skipped=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]
    assert load(FakeEngine(), tmp_path / "step-000005").skipped == 1


def test_the_marker_lists_every_other_file(tmp_path):
    folder = save(tmp_path, at(5))
    files = json.loads((folder / "complete.json").read_text())["files"]
    assert sorted(files) == ["config.yaml", "export/medalign.json", "progress.json", "shard"]
    assert files["shard"] == {"bytes": 4096, "sha256": hashlib.sha256((folder / "shard").read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(1), [50]),
        (Retention(2, 20), [20, 40, 50]),
        (Retention(1, 10), [10, 20, 30, 40, 50]),
        (Retention(3, 7), [30, 40, 50]),
    ],
)
def test_multiples_of_the_interval_are_kept_for_good(tmp_path, retention, left):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, at(step), retention)
    assert [found.step for found in CheckpointsFolder(tmp_path).by_step().values()] == left


def test_a_checkpoint_of_another_file_system_is_refused(tmp_path):
    """A rank on another node has written a file that rank 0 does not see."""
    folder = tmp_path / "step-000005"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"does not see .*step-000005/state/b.*file system that all nodes share"):
        seal(folder, {"state/b": "00"})
