"""A rank that hangs is ended with its stack on disk, and named."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from medalign.observability import watchdog
from medalign.observability.watchdog import STATUS, Watchdog
from medalign.training.callbacks import Callback, Heartbeat
from tests.unit.checkpoint.fakes import room


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "_POLL", 0.02)
    monkeypatch.setattr(watchdog, "_GRACE", 0.2)


class Ended:
    """Keeps the status instead of ending the process."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.event = threading.Event()

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.event.set()


def rank_of(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def report(folder: Path, rank: int, beats: int, what: str, waits: int = 1) -> None:
    """What another rank has written."""
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{rank}.txt").write_text(f"{beats} {waits} rank {rank} (node, pid 1): {what}, for 3 s\n\nstacks\n")


def hang(folder: Path, beats: int) -> Ended:
    """Report progress and then none, until the process is ended."""
    ended = Ended()
    with Watchdog(folder, ended) as dog:
        for _ in range(beats):
            dog.beat("reading the batch of step 7", 0.1)
        assert ended.event.wait(10)
    return ended


def test_a_rank_without_progress_leaves_its_stack_and_ends(tmp_path, caplog):
    assert hang(tmp_path / "stacks", 3).statuses == [STATUS]
    text = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert text.startswith("3 0 rank 0 (") and "reading the batch of step 7, for " in text
    assert "test_watchdog.py" in text and "in hang" in text  # the line in which the main thread waits
    assert "the run hangs: no rank is behind the others" in caplog.text and str(tmp_path / "stacks") in caplog.text
    assert "engine.step_timeout" in caplog.text


def test_the_callbacks_know_before_the_process_ends(tmp_path):
    ended, order = Ended(), []

    class Told(Callback):
        def on_hang(self, trainer):
            order.append((trainer.name, list(ended.statuses)))

    trainer = SimpleNamespace(name="run", call_hooks=lambda hook: hook(Told()))
    with Watchdog(tmp_path / "stacks", ended) as dog:
        Heartbeat(dog, 1.0, 1.0).on_train_start(trainer)
        dog.beat("reading the batch of step 7", 0.1)
        assert ended.event.wait(10)
    assert order == [("run", [])]


def test_progress_or_no_limit_ends_nothing(tmp_path):
    ended = Ended()
    with Watchdog(tmp_path / "stacks", ended) as dog:
        for _ in range(25):  # 2.5 s in all; a busy machine may stall a thread for a second
            dog.beat("a micro-batch", 2)
            time.sleep(0.1)
        dog.beat("a long part", 0)
        time.sleep(0.5)
    assert ended.statuses == [] and not (tmp_path / "stacks").exists()


def test_progress_after_the_report_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_GRACE", 2.0)
    ended = Ended()
    with Watchdog(tmp_path / "stacks", ended) as dog:
        dog.beat("a slow step", 0.1)
        while not (tmp_path / "stacks" / "rank-0.txt").is_file():
            time.sleep(0.01)
        dog.beat("the next one", 60)
        time.sleep(2.5)
        assert ended.statuses == [] and not (tmp_path / "stacks" / "rank-0.txt").exists()


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ({1: (4, "writing"), 2: (2, "reading")}, "the run waits for rank 2 (node, pid 1): reading, for 3 s"),
        ({2: (4, "writing")}, "rank 1 does not answer: its process is stopped, or its node has failed"),
    ],
)
def test_the_rank_behind_the_others_is_named(tmp_path, monkeypatch, caplog, others, verdict):
    rank_of(monkeypatch, 0, 3)
    for rank, (beats, what) in others.items():
        report(tmp_path, rank, beats, what)
    assert hang(tmp_path, 4).statuses == [STATUS]
    assert verdict in caplog.text


def test_of_ranks_with_the_same_progress_the_one_that_does_not_wait_is_named(tmp_path, monkeypatch, caplog):
    rank_of(monkeypatch, 0, 3)
    monkeypatch.setattr(watchdog, "_waits_for_ranks", lambda: True)
    report(tmp_path, 1, 4, "a micro-batch", waits=0)
    report(tmp_path, 2, 4, "a micro-batch")
    hang(tmp_path, 4)
    assert "the run waits for rank 1 (node, pid 1): a micro-batch, for 3 s" in caplog.text


def test_one_rank_gives_the_verdict(tmp_path, monkeypatch, caplog):
    rank_of(monkeypatch, 1, 2)
    report(tmp_path, 0, 4, "writing")
    assert hang(tmp_path, 4).statuses == [STATUS]
    assert "the run hangs" not in caplog.text


def test_reports_that_a_full_disk_has_cut_are_left_out(tmp_path, monkeypatch, caplog):
    """The process must end nevertheless; its own report is known without the file."""
    rank_of(monkeypatch, 0, 2)
    (tmp_path / "rank-1.txt").touch()
    with room(0):
        assert hang(tmp_path, 1).statuses == [STATUS]
    assert "rank-0.txt cannot be written (File too large)" in caplog.text
    assert "rank 1 does not answer" in caplog.text


def test_a_folder_that_cannot_be_used_is_left_to_the_lock(tmp_path):
    (tmp_path / "run").touch()
    with Watchdog(tmp_path / "run" / "stacks"):
        pass
