"""Fixtures shared by all tests: tiny models on disk, made once."""

import logging
import os
from pathlib import Path

import pytest

# Before anything imports triton: its kernels then run on the CPU, one program after the other, in NumPy.
# tools/gpu_check.sh sets it to 0, for tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

from medalign.distributed import log
from tests import tiny

_MARKS = {"e2e": "slow", "distributed": "slow", "slurm": "slurm"}  # folder of tests -> mark of all in it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of whole runs and of a cluster by their folder."""
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
    """Data and golden numbers beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with golden numbers and real data is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def plain_logger() -> None:
    """The command sets the project's logger up for a terminal; each test begins without that."""
    log.handlers[:] = []
    log.propagate = True
    log.setLevel(logging.NOTSET)
