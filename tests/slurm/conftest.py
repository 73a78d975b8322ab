"""The cluster that the environment points to (SLURM_CONF), and jobs on it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import recipe, shards, train, trained  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
TIMEOUT = 400  # seconds; a job that hangs becomes a failure
SHOW_JOB = ["scontrol", "--oneliner", "show", "job"]
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
        text = subprocess.run(SHOW_JOB + [job], capture_output=True, text=True, timeout=60, check=True).stdout
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

    def wait_for_restart(self, job: str) -> None:
        """Wait until a job has been queued again."""
        deadline = time.monotonic() + TIMEOUT
        while "Restarts=0" in subprocess.run(SHOW_JOB + [job], capture_output=True, text=True, check=True).stdout:
            assert time.monotonic() < deadline and self.state(job) not in ENDED, self.text()
            time.sleep(0.5)

    def scancel(self, job: str, *options: str) -> None:
        """Cancel a job, or signal it."""
        subprocess.run(["scancel", *options, job], timeout=60, check=True)

    @contextmanager
    def lost_node(self) -> Iterator[None]:
        """Kill the daemon of the last node, and report the node as down, at the begin; start it again at the end.

        Skips the test if the daemon is not a process of this machine that this user may start again.
        """
        names = subprocess.run(["sinfo", "-hNo", "%N"], capture_output=True, text=True, timeout=60, check=True).stdout
        node = sorted(set(names.split()))[-1]
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=True)
        found = re.search(r"SlurmdPidFile\s*= (\S+)", shown.stdout)
        pid_file = Path(found[1].replace("%n", node)) if found else Path()
        if os.geteuid() or not pid_file.is_file():
            pytest.skip("the daemon of a node is not on this machine, or this user is not its root")
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        with ExitStack() as stack:
            spaces = {kind: stack.enter_context(open(f"/proc/{pid}/ns/{kind}")).fileno() for kind in ("mnt", "uts")}
            os.kill(pid, signal.SIGKILL)
            update = ["scontrol", "update", f"nodename={node}"]
            subprocess.run([*update, "state=down", "reason=killed by a test"], timeout=60, check=True)
            try:
                yield
            finally:
                enter = [f"--{name}=/proc/self/fd/{spaces[kind]}" for name, kind in (("mount", "mnt"), ("uts", "uts"))]
                again = ["nsenter", *enter, *(word.decode() for word in command)]
                files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                subprocess.run(again, pass_fds=tuple(spaces.values()), timeout=60, check=True, **files)
                subprocess.run([*update, "state=resume"], timeout=60, check=False)

    def text(self) -> str:
        """What the jobs have printed."""
        return self.log.read_text() if self.log.is_file() else "no log"


@pytest.fixture(scope="session", autouse=True)
def chosen() -> None:
    """Skip all tests unless SLURM_CONF names a cluster: on a login node they would submit real jobs."""
    if not os.environ.get("SLURM_CONF"):
        pytest.skip("SLURM_CONF does not name a cluster for tests")
    if shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed here")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of at least two nodes; what is left of the test's jobs is canceled at its end."""
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
