"""The engine: exact sums of gradients; each parameter group's own learning rate, weight decay and counter."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.engines import DECAYS, RATES
from tests.distributed.ranks import run_worker

STAGES = ("zero2", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def extensions(tmp_path_factory) -> Iterator[Path]:
    """Torch's folder of extensions. It contains only a lock of DeepSpeed's extension, held by another process."""
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "deepspeed_shm_comm").mkdir()
    with (folder / "deepspeed_shm_comm" / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def accumulated(extensions, tmp_path_factory) -> dict[str, float]:
    return run_worker("accumulated", {"engines": STAGES}, 2, tmp_path_factory.mktemp("sums"), module="engines")[0]


@pytest.mark.parametrize("name", STAGES)
def test_bf16_gradients_of_many_micro_batches_are_summed_in_fp32(accumulated, name):
    """With bf16 sums the relative error is 9e-3; with bf16 sums only over the two ranks it is 1e-3."""
    assert accumulated[name] < 1e-6


def test_engines_neither_compile_nor_wait_for_a_process_that_compiles(extensions, accumulated):
    assert accumulated.keys() == set(STAGES)
    assert [path.name for path in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reloaded")
    settings = {"engines": ["zero2", "zero3"], "folder": str(folder)}
    one, other = run_worker("reloaded", settings, 2, folder / "ranks", module="engines")
    assert one == other
    return one


@pytest.mark.parametrize("name", ["zero2 universal", "zero3 universal", "zero2 wrong", "zero3 wrong"])
def test_a_load_keeps_the_groups_and_counts_each_update_once(reloaded, name):
    """From a universal checkpoint, and from a checkpoint of the same ranks with wrong entries and counters."""
    found = reloaded[name]
    assert found["groups"] == {group: [RATES[group], DECAYS[group]] for group in RATES}
    assert found["rates"] == RATES
    assert found["steps"] == [[2, 2], [3, 3]]
