"""The order of samples depends only on seed and position; ranks divide it but never change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medalign.data.order.order import GlobalOrder, StepPlan
from medalign.errors import ConfigError


@given(size=st.integers(1, 40), seed=st.integers(0, 5), start=st.integers(0, 200), count=st.integers(0, 90))
def test_any_window_equals_the_whole_sequence(size: int, seed: int, start: int, count: int) -> None:
    whole = GlobalOrder(size, seed).take(0, start + count)
    assert np.array_equal(GlobalOrder(size, seed).take(start, count), whole[start:])


@given(size=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_epoch_has_every_sample_once(size: int, seed: int) -> None:
    epochs = GlobalOrder(size, seed).take(0, 3 * size).reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


@given(
    world=st.sampled_from([1, 2, 3, 8, 64, 512]),
    size=st.integers(1, 1100),
    micro=st.integers(1, 9),
    step=st.integers(0, 10**9),
)
def test_the_ranks_together_have_the_global_batch(world: int, size: int, micro: int, step: int) -> None:
    plan = StepPlan(size, micro, world)
    pieces = [plan.micro_batches(step, rank) for rank in range(world)]
    positions = [position for mine in pieces for piece in mine for position in piece]
    assert positions == list(range(step * size, (step + 1) * size))
    assert {len(mine) for mine in pieces} == {plan.accumulation}  # every rank has the same number of micro-batches
    assert max(len(piece) for mine in pieces for piece in mine) <= micro
    assert plan.accumulation == math.ceil(math.ceil(size / world) / micro)  # and no more than needed


def test_even_batches_are_cut_evenly() -> None:
    plan = StepPlan(24, 3, 2)
    assert [[(p.start, p.stop) for p in plan.micro_batches(1, r)] for r in (0, 1)] == [
        [(24, 27), (27, 30), (30, 33), (33, 36)],
        [(36, 39), (39, 42), (42, 45), (45, 48)],
    ]


def test_seeds_and_epochs_differ_and_shuffling_can_be_off() -> None:
    order = GlobalOrder(50, 1)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), GlobalOrder(50, 2).epoch(0))
    assert GlobalOrder(3, 0, shuffle=False).take(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"global batch 10, micro-batch 0 and ranks 3 must be at least 1"):
        StepPlan(10, 0, 3)
    with pytest.raises(ConfigError, match="contain 3 samples, not 4"):
        GlobalOrder(4, 0, shards=[1, 2])
    with pytest.raises(ConfigError, match="shuffle_block is 0"):
        GlobalOrder(4, 0, block=0)
    with pytest.raises(ConfigError, match="no sample"):
        GlobalOrder(0, 0)
    with pytest.raises(ConfigError, match="seed is -1"):
        GlobalOrder(4, -1)


def test_a_small_data_set_is_one_permutation() -> None:
    # The seed words must not change, so that a run resumes with the order it started with.
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2]))).permutation(1000)
    order = GlobalOrder(1000, 7, shards=[400, 0, 599, 1])
    assert np.array_equal(order.epoch(2), expected)
    assert GlobalOrder(6, 0).epoch(0).tolist() == [3, 2, 5, 4, 0, 1]


@given(
    shards=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    seed=st.integers(0, 3),
    block=st.integers(1, 80),
    start=st.integers(0, 400),
    count=st.integers(0, 120),
)
def test_blocks_of_shards(shards: list[int], seed: int, block: int, start: int, count: int) -> None:
    size = sum(shards)
    order = GlobalOrder(size, seed, shards=shards, block=block)
    epochs = order.take(0, 3 * size).reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    fresh = GlobalOrder(size, seed, shards=shards, block=block)
    assert np.array_equal(fresh.take(start, count), order.take(0, start + count)[start:])
    owner = np.repeat(np.arange(len(shards)), shards)
    for epoch in epochs:  # the samples of a shard are in one block, so they are close together
        for shard in range(len(shards)):
            places = np.flatnonzero(owner[epoch] == shard)
            if len(places):
                assert places[-1] - places[0] < block + 2 * max(shards)


def test_shards_come_in_another_order_each_epoch() -> None:
    order = GlobalOrder(1000, 0, shards=[10] * 100, block=20)
    first, second = (order.epoch(e) // 10 for e in (0, 1))
    assert not np.array_equal(np.unique(first[:20]), np.unique(second[:20]))
    assert len(np.unique(first[:20])) == 2
    assert not np.array_equal(order.epoch(0)[:20], np.sort(order.epoch(0)[:20]))
