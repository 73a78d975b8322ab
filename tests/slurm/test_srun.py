"""A local SLURM runs the batch script with two tasks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from medalign.observability.rows import read_rows
from tests.e2e.conftest import recipe, shards  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(shared: Path):
    """A throw-away cluster of two nodes; skipped where it cannot be set up."""
    script = shared / "tools" / "slurm-localhost.sh"
    if shutil.which("slurmctld") is None and os.environ.get("CI") != "true":
        pytest.skip("SLURM is not installed here (Debian: slurm-wlm, munge)")
    started = subprocess.run(["bash", str(script), "up"], capture_output=True, text=True, timeout=300)
    if started.returncode:
        pytest.skip(f"no local SLURM: {started.stderr.strip().splitlines()[-1:]}")
    lines = subprocess.run(["bash", str(script), "env"], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"export (\w+)=(.*)", lines))
    yield os.environ | {name: os.path.expandvars(value.strip("'\"")) for name, value in found.items()}
    subprocess.run(["bash", str(script), "down"], capture_output=True, timeout=120)


def test_sbatch_trains_on_two_tasks(cluster, recipe, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    words = ["sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    words += ["--output", str(tmp_path / "log"), "slurm/train.sbatch", str(recipe), "--run.dir", str(folder)]
    environment = cluster | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*words, "--train.steps", "2"], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "latest").is_file():
        log = (tmp_path / "log").read_text() if (tmp_path / "log").is_file() else "no log yet"
        assert time.monotonic() < deadline and "rror:" not in log, log[-3000:]
        time.sleep(1)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2]
    assert '"ranks": 2' in next((folder / "checkpoints").glob("step-*/progress.json")).read_text()
