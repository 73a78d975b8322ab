"""The order of samples is a function of seed and position; ranks cut it, and never change it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medalign.data.plan import GlobalOrder, StepPlan
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
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 10**9),
)
def test_ranks_together_hold_the_global_batch(world: int, micro: int, accumulation: int, step: int) -> None:
    size = world * micro * accumulation
    plan = StepPlan(size, micro, world)
    starts = [start for rank in range(world) for start in plan.starts(step, rank)]
    positions = [position for start in starts for position in range(start, start + micro)]
    assert positions == list(range(step * size, (step + 1) * size))
    assert plan.accumulation == accumulation


def test_seeds_and_epochs_differ_and_order_can_be_plain() -> None:
    order = GlobalOrder(50, 1)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), GlobalOrder(50, 2).epoch(0))
    assert GlobalOrder(3, 0, shuffle=False).take(2, 5).tolist() == [2, 0, 1, 2, 0]
    assert order.take(10**12, 2).shape == (2,)  # far positions cost no more


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"global batch 10 is not a multiple of micro-batch 2 x 3 ranks = 6"):
        StepPlan(10, 2, 3)
    with pytest.raises(ConfigError, match="no sample"):
        GlobalOrder(0, 0)
    with pytest.raises(ConfigError, match="seed is -1"):
        GlobalOrder(4, -1)
