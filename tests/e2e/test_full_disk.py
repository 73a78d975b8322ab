"""A disk that is full for a while costs checkpoints, and neither the run nor a row of its metrics."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.ranks import finish, start
from tests.e2e.conftest import command, losses


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB; a checkpoint of the tiny student has about 0.5."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"a file system cannot be mounted here: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_outlives_a_full_disk(recipe, trained, small_disk):
    """Full from the start to step 7: the checkpoints of steps 3 and 6 fail, and rows wait in memory."""
    folder = small_disk / "run"
    (output,) = finish(start(["-m", "tests.e2e.filling", "0", "7", *command(recipe, folder)[2:]], 1))
    assert "step 3: no space left for checkpoint" in output and "step 6: no space left for checkpoint" in output
    assert output.count("The run continues") == 2
    assert "metrics.jsonl cannot be written (No space left on device)" in output
    assert "metrics.jsonl is written again" in output
    assert losses(folder) == losses(trained)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["latest", "step-000008"]
