"""The script of the checks ends what it has started, and nothing else. Stand-ins for the cluster and the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PART = """
case $1 in
up) mkdir "${%s}" && touch "$%s/%s" ;;
env) echo "export SLURM_CONF=$SLURM_LOCAL_DIR/slurm.conf" ;;
esac
echo "%s $1" >> CALLS
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script of the checks, beside stand-ins for the tools of real parts."""
    calls = tmp_path / "calls"
    for script, text in {
        "shared/tools/slurm-localhost.sh": PART % ("SLURM_LOCAL_DIR", "SLURM_LOCAL_DIR", "slurm.conf", "slurm"),
        "shared/tools/ssh-hosts.sh": PART % ("SSH_HOSTS_DIR", "SSH_HOSTS_DIR", "hostfile", "hosts"),
        "checkout/tools/test.sh": 'echo "tests ${SLURM_CONF##*/} ${TEST_HOSTFILE##*/}" >> CALLS\nexit "${FAILS:-0}"\n',
    }.items():
        path = tmp_path / script
        path.parent.mkdir(parents=True) if not path.parent.is_dir() else None
        path.write_text(text.replace("CALLS", str(calls)))
    (tmp_path / "checkout" / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "checkout" / ".ci" / "run")
    for program in ("pdsh", "apt-get"):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return tmp_path


def run(folder: Path, **variables: str) -> tuple[int, list[str]]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SLURM_CONF", "TEST_HOSTFILE")}
    environment = kept | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)} | variables
    script = folder / "checkout" / ".ci" / "run"
    status = subprocess.run(["bash", str(script)], env=environment, capture_output=True, check=False).returncode
    assert not list(folder.glob("tmp.*"))
    return status, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1])
def test_what_it_starts_it_ends_even_after_a_failure(checkout, status):
    assert run(checkout, FAILS=str(status)) == (
        status,
        ["slurm up", "slurm env", "hosts up", "tests slurm.conf hostfile", "slurm down", "hosts down"],
    )


def test_what_the_environment_names_is_left_alone(checkout):
    named = {"SLURM_CONF": "/etc/slurm/mine.conf", "TEST_HOSTFILE": "/etc/hosts.mine"}
    assert run(checkout, **named) == (0, ["tests mine.conf hosts.mine"])
