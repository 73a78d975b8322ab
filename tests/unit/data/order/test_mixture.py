"""Mixtures keep their shares, length groups keep their samples, and both can start at any position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.data.order.mixture import ROUND, LengthGroupedOrder, Mixture
from medalign.data.order.order import GlobalOrder
from medalign.errors import ConfigError


def at(order, start: int, count: int) -> np.ndarray:
    return order.indices_at(np.arange(start, start + count, dtype=np.int64))


def mixture(seed: int = 0) -> Mixture:
    sizes = (50, 7, 300)
    return Mixture([GlobalOrder(n, seed, stream=d) for d, n in enumerate(sizes)], [5, 1, 2.5], seed)


def test_a_mixture_has_exactly_its_shares_in_every_round() -> None:
    numbers = at(mixture(), 0, 3 * ROUND).reshape(3, ROUND)
    first = [np.bincount(np.searchsorted([50, 57], row, side="right"), minlength=3) for row in numbers]
    assert all(np.array_equal(counts, first[0]) for counts in first)
    assert np.abs(first[0] / ROUND - np.array([5, 1, 2.5]) / 8.5).max() < 1 / ROUND
    assert not np.array_equal(numbers[0], numbers[1])


def test_each_data_set_of_a_mixture_has_its_own_epochs() -> None:
    numbers = at(mixture(), 0, 2 * ROUND)
    for first, size in ((0, 50), (50, 7), (57, 300)):
        mine = numbers[(numbers >= first) & (numbers < first + size)]
        whole = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(whole) >= 7
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in whole)


@settings(max_examples=30)
@given(start=st.integers(0, 3 * ROUND), count=st.integers(0, 300))
def test_any_range_of_a_mixture_equals_the_whole(start: int, count: int) -> None:
    assert np.array_equal(at(mixture(), start, count), at(mixture(), 0, start + count)[start:])


def test_invalid_weights_are_refused() -> None:
    orders = [GlobalOrder(3, 0), GlobalOrder(4, 0, stream=1)]
    with pytest.raises(ConfigError, match="1 values for 2 folders"):
        Mixture(orders, [1.0], 0)
    with pytest.raises(ConfigError, match="must be above 0"):
        Mixture(orders, [1.0, 0.0], 0)
    assert len(set(at(Mixture(orders, [1e-9, 1.0], 0), 0, ROUND).tolist()) & {0, 1, 2}) == 1  # at least one position


@given(
    size=st.integers(1, 90),
    batch=st.integers(1, 20),
    groups=st.integers(1, 5),
    start=st.integers(0, 200),
    count=st.integers(0, 60),
)
def test_length_groups_keep_every_epoch_whole(size: int, batch: int, groups: int, start: int, count: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 99, size)

    def order() -> LengthGroupedOrder:
        return LengthGroupedOrder(GlobalOrder(size, 1), lambda n: lengths[n], global_batch=batch, groups=groups, seed=1)

    epochs = at(order(), 0, 3 * size).reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert np.array_equal(at(order(), start, count), at(order(), 0, start + count)[start:])


def test_length_groups_leave_less_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 4000)
    plain = GlobalOrder(4000, 0)
    grouped = LengthGroupedOrder(plain, lambda n: lengths[n], global_batch=40, groups=25, seed=0)
    padded = [lengths[at(order, 0, 4000)].reshape(-1, 40).max(1).sum() * 40 for order in (plain, grouped)]
    real = lengths.sum()
    assert (padded[1] - real) / real < 0.05 < 0.5 < (padded[0] - real) / real
    longest = lengths[at(grouped, 0, 1000)].reshape(-1, 40).max(1)
    assert (np.diff(longest) < 0).any()  # short and long batches alternate
    assert (np.diff(longest) > 0).any()
