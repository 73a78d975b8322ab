"""Launchers that the documentation shows, on two ranks: the losses are those of ranks that were started by hand."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, TIMEOUT
from tests.e2e.conftest import losses
from tests.slurm.conftest import WORDS, recipe, shards, whole  # noqa: F401 (fixtures)

BIN = Path(sys.executable).parent


def launch(words: list[str], recipe: Path, folder: Path, where: Path = ROOT, **variables: str) -> str:  # noqa: F811
    """Run a launcher with the words of the training; returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | variables
    command = [*words, "train", str(recipe), "--run.dir", str(folder), *WORDS]
    found = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout + found.stderr


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_supervised_torchrun_survives_a_killed_rank(recipe, whole, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "medalign"]
    moment = {"MOMENT_CALL": "4", "MOMENT_ACT": "KILL", "MOMENT_ONCE": str(tmp_path / "once")}
    supervise = [sys.executable, "-m", "medalign", "supervise", "--max-restarts", "1", "--"]
    output = launch([*supervise, *torchrun], recipe, folder, **moment)
    assert "starting again (1 of 1 without a new step)" in output
    assert losses(folder) == losses(whole)
    rows = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [row["then"] for row in rows] == ["restarted", "ended"] and "no reason from rank 1" in rows[0]["reason"]


@pytest.mark.long
def test_accelerate_starts_the_ranks(recipe, whole, tmp_path):  # noqa: F811
    words = ["launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
    ports = ["--dynamo_backend", "no", "--main_process_port", free_port()]
    launch([str(BIN / "accelerate"), *words, *ports, "-m", "medalign"], recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


def test_the_deepspeed_launcher_starts_ranks_on_two_hosts(recipe, whole, tmp_path):  # noqa: F811
    """Through ssh and pdsh, to the first two hosts of TEST_HOSTFILE, which see the same folders."""
    if "TEST_HOSTFILE" not in os.environ or shutil.which("pdsh") is None:
        pytest.skip("TEST_HOSTFILE does not name a hostfile of two ssh hosts, or pdsh is not installed")
    hosts = [line.split()[0] for line in Path(os.environ["TEST_HOSTFILE"]).read_text().splitlines()][:2]
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    # pdsh does not pass the environment on; PYTHONPATH is passed on by deepspeed itself.
    (tmp_path / ".deepspeed_env").write_text(f"DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nPATH={os.environ['PATH']}\n")
    words = [str(BIN / "deepspeed"), "--hostfile", "hosts", "--master_port", free_port(), "--module", "medalign"]
    output = launch(words, recipe, tmp_path / "run", where=tmp_path)
    assert all(f"{host}: " in output for host in hosts)
    assert losses(tmp_path / "run") == losses(whole)
