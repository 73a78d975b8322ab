"""Fixtures shared by all tests: tiny models on disk, created once."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before triton is imported: its kernels then run on the CPU, one program after another, in NumPy.
# tools/gpu_check.sh sets it to 0, for tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

from medalign.distributed import log
from tests import tiny

_MARKS = {
    "e2e": "slow",
    "distributed": "slow",
    "slurm": "slurm",
    "launchers": "slow",
}  # folder of tests -> mark of all in it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of whole runs and of a cluster by their folder."""
    for item in items:
        mark = _MARKS.get(item.path.relative_to(Path(__file__).parent).parts[0])
        if mark:
            item.add_marker(mark)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with tokenizer and processor."""
    return tiny.save_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip teacher."""
    return tiny.save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared with real data and golden numbers. Tests that need it are skipped if it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real data and golden numbers does not exist")
    return folder


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restore the environment after each test: a command in this process sets RANK, which later jobs would inherit."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def plain_logger() -> None:
    """Reset the project's logger, which the command line sets up for a terminal, before each test."""
    log.handlers[:] = []
    log.propagate = True
    log.setLevel(logging.NOTSET)
