"""The records of a start are those of the processes that hold the run, even if another start fails beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medalign import exit_records
from medalign.errors import ConfigError, RunInUse
from medalign.run_folder import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from medalign.checkpoint import lock
with lock.held(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose rank 0 has left a record."""
    exit_records.Recorder(RunFolder(tmp_path)).write(1, "earlier")
    return RunFolder(tmp_path)


@contextmanager
def in_use(run: RunFolder) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


def reasons(run: RunFolder) -> list[str]:
    return [record.reason for record in exit_records.read(run)]


def fail(run: RunFolder, error: Exception = ConfigError("port 29500 is in use"), own: bool = False) -> None:  # noqa: B008
    with pytest.raises(type(error)), exit_records.recorded(run) as recorder:
        if own:
            recorder.own()
        raise error


def test_a_start_that_fails_before_it_holds_the_run_leaves_its_reason(run):
    fail(run)
    assert reasons(run) == ["port 29500 is in use"]


def test_a_start_that_fails_beside_a_running_training_leaves_its_records_alone(run):
    with in_use(run):
        fail(run)
        fail(run, RunInUse("another training is running"))
        assert reasons(run) == ["earlier"]


def test_a_rank_of_the_start_that_holds_the_run_writes_its_record(run):
    """Rank 0 may hold the lock still when another rank ends."""
    with in_use(run):
        fail(run, own=True)
    assert reasons(run) == ["port 29500 is in use"]


def test_the_record_of_an_earlier_start_is_removed(run):
    with exit_records.recorded(run) as recorder:
        assert reasons(run) == []
        recorder.own()
    assert reasons(run) == [""]


@pytest.mark.slow
def test_a_second_start_with_a_wrong_engine_file_changes_no_record(run, tmp_path):
    (tmp_path / "engine.json").write_text("{")
    words = ["train", "phantom", "--run.dir", str(run.path), "--data.train", "shards"]
    words += ["--engine.deepspeed", str(tmp_path / "engine.json")]
    with in_use(run):
        found = subprocess.run([sys.executable, "-m", "medalign", *words], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "is not JSON" in found.stderr
    assert reasons(run) == ["earlier"]
