"""A run resumes at any position immediately; neither the order nor the loader replays earlier samples."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from medalign.data.batches.loader import TrainLoader
from medalign.data.order import mixture, order
from medalign.data.order.mixture import ROUND, LengthGroupedOrder, Mixture
from medalign.data.order.order import GlobalOrder, Order
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.table import IndexTable
from medalign.data.shards.table_reader import read_table
from medalign.data.shards.writer import write_shards
from medalign.data.storage.byte_ranges import StorageOptions
from tests.unit.data.batches.test_loader import collator
from tests.unit.data.tiny_data import record

SAMPLES, SHARD, BATCH = 1_000_000, 1000, 32


def plain() -> Order:
    return GlobalOrder(SAMPLES, 3, shards=[SHARD] * (SAMPLES // SHARD))


def two_folders() -> Order:
    sizes = (SAMPLES // 4, 3 * SAMPLES // 4)
    return Mixture([GlobalOrder(n, 3, shards=[SHARD] * (n // SHARD), stream=d) for d, n in enumerate(sizes)], [1, 2], 3)


def grouped() -> Order:
    return LengthGroupedOrder(plain(), lambda numbers: numbers % 97, global_batch=BATCH, groups=8, seed=3)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        # the order of the shards and one block; where the stretch runs over an edge, two of each
        (plain, 4),
        # two rounds of the mixture at most, and as above for each of two data sets
        (two_folders, 2 + 2 * 4),
        # two windows at most, each with the turn of its batches
        (grouped, 2 + 4),
    ],
)
@pytest.mark.parametrize("start", [0, 320, 10**9, 10**12])
def test_far_positions_cost_no_more(
    make: Callable[[], Order], most: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled: list[int] = []
    real = order.generator

    class Counting:
        def __init__(self, *words: int) -> None:
            self.real = real(*words)

        def permutation(self, things):
            shuffled.append(things if isinstance(things, int) else len(things))
            return self.real.permutation(things)

    for module in (order, mixture):
        monkeypatch.setattr(module, "generator", Counting)
    numbers = make().indices_at(np.arange(start, start + BATCH, dtype=np.int64))
    assert len(set(numbers.tolist())) == BATCH
    assert 1 <= len(shuffled) <= most
    assert max(shuffled) <= max(order.BLOCK + SHARD, ROUND)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """A million samples that are copies of the seven in one shard."""
    folder = tmp_path_factory.mktemp("large") / "seven"
    write_shards([record(i) for i in range(7)], folder)
    small = read_table(folder)
    rows = np.resize(small.rows, SAMPLES)
    lengths = np.resize(np.diff(small.key_ends, prepend=0), SAMPLES)
    keys = np.resize(small.keys, int(lengths.sum()))
    table = IndexTable(small.shards, rows, np.cumsum(lengths), keys, small.further, small.max_images)
    return ShardIndex([str(folder)], [table], StorageOptions())


@pytest.mark.parametrize("make", [plain, two_folders, grouped])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_batch_is_as_fast_at_a_far_step(large: ShardIndex, make: Callable[[], Order], workers: int) -> None:
    def seconds(step: int) -> float:
        begun = time.perf_counter()
        order = make()
        ready = TrainLoader(
            large, order, collator(), global_batch=BATCH, micro_batch=8, start_step=step, workers=workers
        )
        batches = next(iter(ready))
        taken = time.perf_counter() - begun
        drawn = order.indices_at(np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int64))
        assert [key for batch in batches for key in batch.keys] == [large.key(n) for n in drawn]
        return taken

    near, far = (min(seconds(step) for _ in range(3)) for step in (10, 1_000_003))
    assert far < 2
    assert far < 4 * near + 0.2  # the least of three, for a machine that is busy with other things
