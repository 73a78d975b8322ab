"""The shell scripts pass shellcheck."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_shell_scripts_pass_shellcheck():
    scripts = [*sorted(ROOT.glob("slurm/*.sbatch")), ROOT / ".ci" / "run", *sorted(ROOT.glob("tools/*.sh"))]
    found = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
