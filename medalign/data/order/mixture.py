"""Several data sets by weight, and batches of samples of like length: orders made from orders, as repeatable as they.

Both are functions of the seed and the position alone, like `plan.GlobalOrder`, and any stretch is computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from medalign.data.order.order import GlobalOrder, Order, generator
from medalign.errors import ConfigError

ROUND = 4096  # positions in which every data set has exactly its share
_MIX, _GROUP = 3, 4  # what a generator is for; a word of its seed


class Mixture:
    """Several data sets, each with a weight; each goes through its own epochs at its own speed.

    In every ROUND positions data set d has round(ROUND w_d / sum of w) places (by the largest remainder, at least
    one), shuffled anew for each round. Every sample of d comes exactly once in each epoch of d. Sample numbers count
    through the data sets in their order.
    """

    def __init__(self, orders: Sequence[GlobalOrder], weights: Sequence[float], seed: int) -> None:
        if len(orders) != len(weights):
            raise ConfigError(f"data.weights holds {len(weights)} numbers for {len(orders)} folders; give one each")
        if not all(0 < weight < np.inf for weight in weights):
            raise ConfigError(f"data.weights is {list(weights)}; each must be above 0. Leave out what is not wanted")
        self._orders = list(orders)
        self._firsts = np.cumsum([0, *(order.size for order in orders)])
        self._seed = seed
        self._share = _shares(np.asarray(weights, dtype=np.float64), ROUND)
        self._pattern = lru_cache(4)(self._make_pattern)

    @property
    def size(self) -> int:
        """Samples of all data sets."""
        return int(self._firsts[-1])

    @property
    def epoch_size(self) -> None:
        """There is no common epoch."""

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at these positions, int64 [n]."""
        rounds, places = np.divmod(positions, ROUND)
        numbers = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(rounds):
            here = np.flatnonzero(rounds == number)
            sources, earlier = self._pattern(int(number))
            source, own = sources[places[here]], earlier[places[here]]
            for d in np.unique(source):
                mine = source == d
                numbers[here[mine]] = self._firsts[d] + self._orders[d].indices_at(number * self._share[d] + own[mine])
        return numbers

    def _make_pattern(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The data set at each place of a round, and how many places before it are that data set's."""
        sources = generator(self._seed, number, _MIX).permutation(np.repeat(np.arange(len(self._share)), self._share))
        earlier = np.empty(ROUND, np.int64)
        for d, count in enumerate(self._share):
            earlier[sources == d] = np.arange(count)
        return sources, earlier


class LengthGroupedOrder:
    """Another order with the samples of `groups` neighboring global batches sorted by length, then cut again.

    The batches of such a window come in random order, so short and long ones alternate; within a batch, samples
    rise in length, so that the padding of a micro-batch is small too. Windows end with the epoch: every sample comes
    once an epoch, as before (a mixture has no epoch; there, the samples of a window stay in it).

    Args:
        order: the order to regroup.
        lengths: sample numbers to their lengths, in any unit.
        global_batch: samples of a batch.
        groups: batches of a window.
    """

    def __init__(
        self,
        order: Order,
        lengths: Callable[[np.ndarray], np.ndarray],
        *,
        global_batch: int,
        groups: int,
        seed: int,
    ) -> None:
        self._order = order
        self._lengths = lengths
        self._batch = global_batch
        self._window = global_batch * groups
        self._seed = seed
        self._arranged = lru_cache(4)(self._arrange)

    @property
    def size(self) -> int:
        return self._order.size

    @property
    def epoch_size(self) -> int | None:
        return self._order.epoch_size

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at these positions, int64 [n]."""
        numbers = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.epoch_size if self.epoch_size else np.zeros_like(positions)
        windows = positions // self._window
        for window, epoch in np.unique(np.stack([windows, epochs], axis=1), axis=0).tolist():
            here = (windows == window) & (epochs == epoch)
            start, arranged = self._arranged(window, epoch)
            numbers[here] = arranged[positions[here] - start]
        return numbers

    def _arrange(self, window: int, epoch: int) -> tuple[int, np.ndarray]:
        """First position and sample numbers of the window's part in this epoch."""
        start, end = window * self._window, (window + 1) * self._window
        if self.epoch_size:
            start, end = max(start, epoch * self.epoch_size), min(end, (epoch + 1) * self.epoch_size)
        numbers = self._order.indices_at(np.arange(start, end, dtype=np.int64))
        by_length = numbers[np.argsort(self._lengths(numbers), kind="stable")]
        # Borders of global batches; the first and the last piece may be parts of one.
        borders = np.unique([start, *range(-(-start // self._batch) * self._batch, end, self._batch), end])
        sizes = np.diff(borders)
        turn = generator(self._seed, window, _GROUP, epoch).permutation(len(sizes))
        arranged = np.empty_like(by_length)
        taken = 0
        for piece in turn:
            first, count = borders[piece] - start, sizes[piece]
            arranged[first : first + count] = by_length[taken : taken + count]
            taken += count
        return start, arranged


def _shares(weights: np.ndarray, places: int) -> np.ndarray:
    """Whole numbers in proportion to the weights, each at least 1, that add up to `places`."""
    if len(weights) > places:
        raise ConfigError(f"data.weights holds {len(weights)} numbers; at most {places} folders can be mixed")
    free = places - len(weights)
    exact = np.maximum(weights / weights.sum() * places - 1, 0)
    exact = exact / max(exact.sum(), 1e-300) * free
    shares = np.floor(exact).astype(np.int64)
    remainder = exact - shares
    largest = np.argsort(-remainder, kind="stable")[: free - int(shares.sum())]
    shares[largest] += 1
    return shares + 1
