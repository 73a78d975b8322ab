"""A rank that hangs, or is stopped, ends the run within its time-outs: named, with the stacks, and ready to resume."""

from __future__ import annotations

import time

import pytest

from medalign.observability.watchdog import STATUS
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, losses, train

WORDS = ("--losses.extra", "[tests.moments.moment]", "--engine.step_timeout", "8", "--log.wandb", "off")


@pytest.mark.parametrize(
    ("act", "verdict"),
    [
        ("wait", "the run waits for rank 1 ("),
        ("STOP", "rank 1 does not answer: its process is stopped"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_ends(recipe, tmp_path, act, verdict):
    """In step 5: it waits for a signal that does not come, or receives SIGSTOP."""
    folder = tmp_path / "run"
    processes = start(command(recipe, folder, WORDS), 2, MOMENT_CALL="5", MOMENT_ACT=act)
    try:
        output = processes[0].communicate(timeout=TIMEOUT)[0]
        assert processes[0].returncode == STATUS, output
    finally:
        for process in processes:  # as a launcher does once one rank has ended
            process.kill()
            process.communicate()
    assert f"error: the run hangs: {verdict}" in output and str(folder / "stacks") in output
    assert "in _totals" in (folder / "stacks" / "rank-0.txt").read_text()  # rank 0 waits in the first reduction
    if act == "wait":
        assert "tests/moments.py" in (folder / "stacks" / "rank-1.txt").read_text()
    assert [row[0] for row in losses(folder)] == [1, 2, 3, 4]
    assert (folder / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_what_hangs_on_one_rank_does_not_stay(recipe, trained, tmp_path):
    """The next start resumes exactly, and removes the stacks of the rank that it has."""
    folder = tmp_path / "run"
    words = (*WORDS, "--engine.step_timeout", "5")
    (process,) = start(command(recipe, folder, words), 1, MOMENT_CALL="9", MOMENT_RANK="0", MOMENT_ACT="wait")
    began = time.monotonic()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == STATUS and time.monotonic() - began < TIMEOUT
    assert "tests/moments.py" in (folder / "stacks" / "rank-0.txt").read_text()
    train(recipe, folder, *words)
    assert losses(folder) == losses(trained) and not list((folder / "stacks").iterdir())
