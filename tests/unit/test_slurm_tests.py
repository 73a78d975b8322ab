"""The tests that need a cluster leave one alone that was not named for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_job_is_submitted_without_slurm_conf(tmp_path):
    """As on a login node."""
    for name in ("sbatch", "sinfo"):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\ntouch {tmp_path}/called\nprintf "a\\nb\\n"\n')
        command.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/slurm"],
        cwd=ROOT,
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "SLURM_CONF does not name a cluster" in found.stdout and "passed" not in found.stdout, found.stdout
    assert not (tmp_path / "called").exists()
