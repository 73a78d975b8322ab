"""USR1 and TERM lose no step: both ranks write a checkpoint and end, and the next start ends with the same numbers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from medalign.observability.rows import read_rows
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, losses, train

WORDS = ("--losses.extra", "[tests.moments.moment]", "--checkpoint.interval", "100", "--data.workers", "1")
SAID = "stopped after step 4 with a checkpoint; the run has 8 steps"


def stopped(processes: list[subprocess.Popen], status: int) -> str:
    """Wait for ranks that end with a status; returns what rank 0 printed."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs[0]


@pytest.fixture(scope="module")
def whole(recipe: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on two ranks, with a validation after step 4 and the last one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, folder, *WORDS, *validation(shards), world=2)
    return folder


def validation(shards: Path) -> tuple[str, ...]:
    return ("--data.validation", str(shards / "val"), "--train.evaluate_every", "4")


def validated(folder: Path) -> list[tuple[int, float]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [(row["step"], row["validation/loss/total"]) for row in rows if "validation/loss/total" in row]


def test_a_signal_to_one_rank_loses_no_step(recipe, shards, whole, tmp_path):
    """Rank 1 receives USR1 in step 4: the validation after it is left to the next start."""
    folder, words = tmp_path / "run", (*WORDS, *validation(shards))
    processes = start(command(recipe, folder, words), 2, MOMENT_CALL="4", MOMENT_ACT="USR1")
    assert f"SIGUSR1: {SAID}" in stopped(processes, 75)
    assert (folder / "checkpoints" / "latest").read_text() == "step-000004\n"
    assert [row[0] for row in losses(folder)] == [1, 2, 3, 4] and validated(folder) == []
    train(recipe, folder, *words, world=2)
    assert losses(folder) == losses(whole) and validated(folder) == validated(whole)
    assert f"SIGUSR1: {SAID}" in (folder / "logs" / "rank-0.log").read_text()


def test_a_signal_to_every_process_of_the_job_loses_no_step(recipe, shards, whole, tmp_path):
    """TERM as `scancel` sends it, to the loader's processes too, while rank 1 waits for it in the validation."""
    folder, words = tmp_path / "run", (*WORDS, *validation(shards))
    processes = start(command(recipe, folder, words), 2, MOMENT_CALL="5", MOMENT_ACT="wait")
    while not (folder / "metrics.jsonl").is_file() or len(losses(folder)) < 4:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)
    for process in processes:
        for pid in [process.pid, *children(process.pid)]:
            os.kill(pid, signal.SIGTERM)
    output = stopped(processes, 143)
    assert f"SIGTERM: {SAID}" in output and re.search(r"the run has stopped \d+\.\d s after the signal", output)
    train(recipe, folder, *words, world=2)
    assert losses(folder) == losses(whole) and validated(folder) == validated(whole)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert found, "no loader process was found"
    return [int(one) for one in found]
