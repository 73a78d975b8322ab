"""A run that is killed and started again ends with the losses of an uninterrupted run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from medalign.data.shards.index import ShardIndex
from medalign.observability.rows import read_rows
from tests.e2e.conftest import kill_at, losses, train


def clocks(folder: Path) -> tuple[list[float], list[datetime]]:
    """Return the seconds of training and the time of day of each row."""
    rows = read_rows(folder / "metrics.jsonl")
    return [row["time/elapsed_seconds"] for row in rows], [datetime.fromisoformat(row["time"]) for row in rows]


def test_a_killed_run_resumes_exactly(recipe, trained, tmp_path):
    """Bit for bit, including dropout and data order: it is killed after step 5 and resumes from step 3."""
    folder = tmp_path / "killed"
    kill_at(recipe, folder, step=5)
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-000003"
    (checkpoints / ".partial-step-000006").mkdir()  # as if killed while writing it
    (output,) = train(recipe, folder)
    assert "resuming from" in output
    assert losses(folder) == losses(trained)
    assert len(losses(folder)) == 8
    elapsed, times = clocks(folder)
    assert elapsed == sorted(elapsed) and times == sorted(times)
    # Step 4 was run by the second start, which loaded for seconds before it: the time of training leaves that out.
    assert 0 < elapsed[3] - elapsed[2] < (times[3] - times[2]).total_seconds() - 1
    assert not list(checkpoints.glob(".partial-*"))
    assert (checkpoints / "latest").read_text().strip() == "step-000008"
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_finished_run_is_not_changed(recipe, trained):
    before = losses(trained)
    (output,) = train(recipe, trained)
    assert "8 steps, 32 samples" in output
    assert losses(trained) == before


def test_epochs_are_a_number_of_steps_and_resume_exactly(recipe, shards, trained, tmp_path):
    """Eight steps of 4 samples, given as epochs, interrupted once: the run of eight steps, bit for bit."""
    samples, folder = len(ShardIndex.open(shards / "train")), tmp_path / "epochs"
    words = ["--train.epochs", str(32 / samples)]
    kill_at(recipe, folder, 5, *words)
    (output,) = train(recipe, folder, *words)
    assert f"8 steps of 4 samples: {32 / samples:.4g} epochs of {samples} samples" in output
    assert losses(folder) == losses(trained)
    written = (folder / "config.yaml").read_text()
    assert written.startswith(f"# {32 / samples} epochs are 8 steps\n") and "steps: null" in written
