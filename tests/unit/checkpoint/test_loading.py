"""A run resumes from the newest whole checkpoint, and says so when that is not the newest one."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from medalign.checkpoint import loading
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.state import read_state
from medalign.errors import CheckpointError
from tests.unit.checkpoint.fakes import FakeEngine, at, room, save


def test_for_another_number_of_ranks_a_copy_is_converted(tmp_path, monkeypatch, caplog):
    """What it needs is reported before."""
    caplog.set_level("INFO", logger="medalign")
    folder = save(tmp_path, at(5, ranks=4))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setattr(loading, "CONVERSION_SPEED", size / 42)
    monkeypatch.setattr(loading, "to_universal", lambda source, target, agree: shutil.copytree(source, target))
    engine = FakeEngine()
    assert load(engine, folder) == at(5, ranks=1)
    assert engine.loaded == [tmp_path / ".partial-universal-step-000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]
    reported = "was written by 4 ranks: converting it for 1 (about 42 s; 0.00 GiB of disk space until it is loaded, "
    assert reported in caplog.text and "the checkpoint is converted" in caplog.text


def test_each_part_of_a_conversion_may_take_longer_by_what_is_expected(tmp_path, monkeypatch):
    """Otherwise the watchdog of the run would end it: the limit is that of a part of the start."""

    def convert(source: Path, target: Path, agree: Callable[[], AbstractContextManager[None]]) -> None:
        for _ in range(2):
            with agree():
                pass
        shutil.copytree(source, target)

    folder = save(tmp_path, at(5, ranks=4))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setattr(loading, "CONVERSION_SPEED", size / 42)
    monkeypatch.setattr(loading, "to_universal", convert)
    calls: list[tuple[str, float]] = []
    load(FakeEngine(), folder, lambda what, more: calls.append((what, more)))
    part = ("converting the checkpoint for another number of ranks", pytest.approx(42))
    assert calls == [part, part, part, part, ("loading the converted checkpoint", 0.0)]
    del calls[:]
    load(FakeEngine(), save(tmp_path, at(6)), lambda what, more: calls.append((what, more)))
    assert calls == []


def test_missing_space_is_detected_before_converting(tmp_path, monkeypatch):
    folder = save(tmp_path, at(5, ranks=4))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2 * size))
    with pytest.raises(CheckpointError, match=r"could not be converted .*GiB more are needed.*free disk space"):
        load(FakeEngine(), folder)


def test_a_full_disk_while_converting_keeps_the_checkpoint(tmp_path, monkeypatch):
    def full(source: Path, target: Path, agree: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = save(tmp_path, at(5, ranks=4))
    monkeypatch.setattr(loading, "to_universal", full)
    with pytest.raises(CheckpointError, match="step-000005 could not be converted .*No space left.*free disk space"):
        load(FakeEngine(), folder)
    assert find_whole(tmp_path) == folder and read_state(folder).ranks == 4


def test_torch_without_space_while_converting_is_reported(tmp_path, monkeypatch):
    def full(source: Path, target: Path, agree: object) -> None:
        target.mkdir()
        torch.save({"w": torch.zeros(100_000)}, target / "state.pt")

    folder = save(tmp_path, at(5, ranks=4))
    monkeypatch.setattr(loading, "to_universal", full)
    with room(50_000), pytest.raises(CheckpointError, match="step-000005 could not be converted .*free disk space"):
        load(FakeEngine(), folder)


def test_no_checkpoint_is_none(tmp_path):
    assert find_whole(tmp_path / "none") is None


def flip(path: Path, count: int = 64) -> None:
    """Change bytes in the middle and keep the size."""
    content = bytearray(path.read_bytes())
    for index in range(len(content) // 2, min(len(content), len(content) // 2 + count)):
        content[index] ^= 0xFF
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "64 flipped bytes": (lambda c: flip(c / "shard"), "shard is damaged: its content"),
    "one flipped byte": (lambda c: flip(c / "shard", 1), "shard is damaged: its content"),
    "cut": (lambda c: (c / "shard").write_bytes((c / "shard").read_bytes()[:100]), "100 bytes instead of 4096"),
    "empty": (lambda c: (c / "shard").write_bytes(b""), "0 bytes instead of 4096"),
    "zeros": (lambda c: (c / "shard").write_bytes(bytes(4096)), "shard is damaged: its content"),
    "gone": (lambda c: (c / "shard").unlink(), "shard is missing"),
    "export gone": (lambda c: shutil.rmtree(c / "export"), "export/medalign.json is missing"),
    "export": (lambda c: flip(c / "export/medalign.json"), "export/medalign.json is damaged"),
    "progress": (lambda c: flip(c / "progress.json"), "progress.json is damaged"),
    "settings": (lambda c: flip(c / "config.yaml"), "config.yaml is damaged"),
    "marker gone": (lambda c: (c / "complete.json").unlink(), "complete.json is missing"),
    "marker cut": (lambda c: (c / "complete.json").write_text('{"files": {"sha'), "complete.json is damaged"),
    "marker zeros": (lambda c: (c / "complete.json").write_bytes(bytes(99)), "complete.json is damaged"),
    "marker of another form": (lambda c: (c / "complete.json").write_text('{"files": 3}'), "complete.json is damaged"),
    "checkpoint gone": (lambda c: shutil.rmtree(c), "step-000010, which does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_after_any_damage_the_checkpoint_before_is_taken_with_a_warning(tmp_path, caplog, damage):
    act, reason = DAMAGES[damage]
    for step in (5, 10):
        save(tmp_path, at(step))
    act(tmp_path / "step-000010")
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    assert reason in caplog.text and "step-000010" in caplog.text
    assert load(FakeEngine(), tmp_path / "step-000005") == at(5)


@pytest.mark.parametrize("content", [None, b"", bytes(12), b"\xff\xfe", b"step-\n", b"../elsewhere\n"])
def test_without_a_readable_latest_the_newest_whole_one_is_taken(tmp_path, caplog, content):
    for step in (5, 10, 15):
        save(tmp_path, at(step), keep=3)
    flip(tmp_path / "step-000015" / "shard")
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert find_whole(tmp_path) == tmp_path / "step-000010"
    assert "latest" in caplog.text and "step-000015 is damaged" in caplog.text
    assert f"resumes from {tmp_path / 'step-000010'} instead" in caplog.text


def test_a_run_that_was_set_back_never_takes_a_later_checkpoint(tmp_path):
    for step in (5, 10):
        save(tmp_path, at(step))
    (tmp_path / "latest").write_text("step-000005\n")
    assert find_whole(tmp_path) == tmp_path / "step-000005"
    flip(tmp_path / "step-000005" / "shard")
    with pytest.raises(CheckpointError, match="step-000005: shard is damaged.*restore one from a copy"):
        find_whole(tmp_path)
    shutil.rmtree(tmp_path / "step-000005")
    with pytest.raises(CheckpointError, match="step-000005, which does not exist.*write step-000010 into"):
        find_whole(tmp_path)


def test_a_run_never_starts_again_beside_its_checkpoints(tmp_path):
    """All are damaged: to begin again must be the user's decision."""
    for step in (5, 10):
        save(tmp_path, at(step))
        flip(tmp_path / f"step-{step:06d}" / "shard")
    (tmp_path / "latest").unlink()
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .* .step-000010: .*step-000005: .*remove .*again"
    ):
        find_whole(tmp_path)
