"""Killed at any moment and started again, a run ends with the numbers of the run that was never interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from medalign.observability.sinks import read_rows
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, train

EXACT = ("loss/total", "loss/language", "loss/similarity", "loss/attention", "optim/grad_norm", "optim/lr")


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], *(row[name] for name in EXACT)) for row in read_rows(folder / "metrics.jsonl")]


def kill_at(recipe: Path, folder: Path, step: int) -> None:
    """Starts a run and kills it, without warning, once it has written the row of `step`."""
    (process,) = start(command(recipe, folder), 1)
    rows = folder / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (rows.is_file() and rows.read_text().count("\n") >= step):
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_killed_run_goes_on_exactly(recipe, trained, tmp_path):
    """Bit for bit, dropout and data order included: step 5 is done, the checkpoint is that of step 3."""
    folder = tmp_path / "killed"
    kill_at(recipe, folder, step=5)
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-000003"
    (checkpoints / ".partial-step-000006").mkdir()  # as if killed while writing it
    (output,) = train(recipe, folder)
    assert "going on from" in output
    assert losses(folder) == losses(trained)
    assert len(losses(folder)) == 8
    assert not list(checkpoints.glob(".partial-*"))
    assert (checkpoints / "latest").read_text().strip() == "step-000008"
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_finished_run_is_left_as_it_is(recipe, trained):
    before = losses(trained)
    (output,) = train(recipe, trained)
    assert "8 steps, 32 samples" in output
    assert losses(trained) == before
