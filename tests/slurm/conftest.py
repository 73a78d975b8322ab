"""The cluster that the environment points to (SLURM_CONF), and jobs on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import recipe, shards, train, trained  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
TIMEOUT = 400  # seconds; a job that hangs becomes a failure
WORDS = ("--losses.extra", "[tests.moments.moment]", "--checkpoint.interval", "100")


class Cluster:
    """Submits the project's batch scripts. `submitted` holds the numbers of the jobs."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.submitted: list[str] = []

    def submit(self, script: str, *words: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a script as a user would; returns the number of the job."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, f"slurm/{script}.sbatch", *words]
        found = subprocess.run(
            command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert found.returncode == 0, found.stderr
        self.submitted.append(found.stdout.strip())
        return self.submitted[-1]

    def state(self, job: str) -> str:
        """The state of a job, or of all tasks of an array, such as RUNNING."""
        words = ["scontrol", "--oneliner", "show", "job", job]
        text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
        states = re.findall(r"JobState=(\w+)", text)
        return next((state for state in states if state not in ENDED), states[0])

    def wait(self, job: str) -> str:
        """Wait until a job has ended; returns its state."""
        deadline = time.monotonic() + TIMEOUT
        while self.state(job) not in ENDED:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.5)
        return self.state(job)

    def wait_for_row(self, job: str, folder: Path, step: int) -> None:
        """Wait until a run has logged a step."""
        deadline, rows = time.monotonic() + TIMEOUT, folder / "metrics.jsonl"
        while not (rows.is_file() and f'"step": {step},' in rows.read_text()):
            assert time.monotonic() < deadline and self.state(job) not in ENDED, self.text()
            time.sleep(0.1)

    def scancel(self, job: str) -> None:
        """Cancel a job."""
        subprocess.run(["scancel", job], timeout=60, check=True)

    def text(self) -> str:
        """What the jobs have printed."""
        return self.log.read_text() if self.log.is_file() else "no log"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of at least two nodes; what is left of the test's jobs is canceled at its end."""
    if shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed here")
    sinfo = subprocess.run(["sinfo", "--noheader", "--Node"], capture_output=True, text=True, timeout=60, check=False)
    if sinfo.returncode or len(sinfo.stdout.splitlines()) < 2:
        pytest.skip("no SLURM cluster of two nodes answers: see SLURM_CONF")
    found = Cluster(tmp_path / "job.log")
    yield found
    subprocess.run(["scancel", *found.submitted], timeout=60, check=False)


@pytest.fixture(scope="session")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The uninterrupted run on two ranks, started without SLURM."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, folder, *WORDS, world=2)
    return folder
