"""Orders built from other orders: weighted mixtures of data sets, and batches of samples of similar length.

Like `order.GlobalOrder`, both depend only on the seed and the position, and any range can be computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from medalign.data.order.order import GlobalOrder, Order, generator
from medalign.errors import ConfigError

ROUND = 4096  # positions in which every data set has exactly its share
_MIX, _GROUP = 3, 4  # purpose of a generator; part of its seed


class Mixture:
    """Several data sets with weights. Each goes through its own epochs at its own speed.

    In every ROUND positions, data set d has round(ROUND w_d / sum of w) positions (by the largest remainder method, at
    least one), shuffled for each round. Every sample of d occurs exactly once in each epoch of d. Sample indices count
    through the data sets in order.

    Args:
        orders: the order of each data set.
        weights: the weight of each data set, above 0.
        seed: not negative.

    Raises:
        ConfigError: the weights are invalid, or their number differs from the number of data sets.
    """

    def __init__(self, orders: Sequence[GlobalOrder], weights: Sequence[float], seed: int) -> None:
        if len(orders) != len(weights):
            raise ConfigError(f"data.weights has {len(weights)} values for {len(orders)} folders; give one per folder")
        if not all(0 < weight < np.inf for weight in weights):
            raise ConfigError(f"data.weights is {list(weights)}; each must be above 0. Remove folders you do not want")
        self._orders = list(orders)
        self._firsts = np.cumsum([0, *(order.size for order in orders)])
        self._seed = seed
        self._share = _shares(np.asarray(weights, dtype=np.float64), ROUND)
        self._pattern = lru_cache(4)(self._make_pattern)

    @property
    def size(self) -> int:
        """Total number of samples of all data sets."""
        return int(self._firsts[-1])

    @property
    def epoch_size(self) -> None:
        """None: the data sets have no common epoch."""

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample indices at these positions, int64 [n]."""
        rounds, offsets = np.divmod(positions, ROUND)
        indices = np.empty(len(positions), dtype=np.int64)
        for round_index in np.unique(rounds):
            here = np.flatnonzero(rounds == round_index)
            sources, earlier = self._pattern(int(round_index))
            source, own = sources[offsets[here]], earlier[offsets[here]]
            for d in np.unique(source):
                mine = source == d
                positions_d = round_index * self._share[d] + own[mine]
                indices[here[mine]] = self._firsts[d] + self._orders[d].indices_at(positions_d)
        return indices

    def _make_pattern(self, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set at each position of a round, and number of earlier positions with this data set."""
        repeated = np.repeat(np.arange(len(self._share)), self._share)
        sources = generator(self._seed, round_index, _MIX).permutation(repeated)
        earlier = np.empty(ROUND, np.int64)
        for d, count in enumerate(self._share):
            earlier[sources == d] = np.arange(count)
        return sources, earlier


class LengthGroupedOrder:
    """An order in which windows of `groups` consecutive global batches are sorted by length and cut into batches again.

    The batches of a window come in random order, so short and long batches alternate. Within a batch, samples are
    sorted by length, which also keeps the padding of a micro-batch small. A window ends with the epoch, so every sample
    still occurs once per epoch. A mixture has no epoch; there, samples stay in their window.

    Args:
        order: the order to regroup.
        lengths: maps sample indices to lengths in any unit.
        global_batch: samples per batch.
        groups: batches per window.
        seed: not negative.
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
        """Total number of samples."""
        return self._order.size

    @property
    def epoch_size(self) -> int | None:
        """Number of positions of an epoch, or None if there is no epoch."""
        return self._order.epoch_size

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample indices at these positions, int64 [n]."""
        indices = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.epoch_size if self.epoch_size else np.zeros_like(positions)
        windows = positions // self._window
        for window, epoch in np.unique(np.stack([windows, epochs], axis=1), axis=0).tolist():
            here = (windows == window) & (epochs == epoch)
            start, arranged = self._arranged(window, epoch)
            indices[here] = arranged[positions[here] - start]
        return indices

    def _arrange(self, window: int, epoch: int) -> tuple[int, np.ndarray]:
        """First position and sample indices of the part of a window that belongs to this epoch."""
        start, end = window * self._window, (window + 1) * self._window
        if self.epoch_size:
            start, end = max(start, epoch * self.epoch_size), min(end, (epoch + 1) * self.epoch_size)
        indices = self._order.indices_at(np.arange(start, end, dtype=np.int64))
        by_length = indices[np.argsort(self._lengths(indices), kind="stable")]
        # Boundaries of global batches; the first and the last piece may be incomplete.
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
    """Integers in proportion to the weights, each at least 1, that add up to `places`."""
    if len(weights) > places:
        raise ConfigError(f"data.weights has {len(weights)} values; at most {places} folders can be mixed")
    free = places - len(weights)
    exact = np.maximum(weights / weights.sum() * places - 1, 0)
    exact = exact / max(exact.sum(), 1e-300) * free
    shares: np.ndarray = np.floor(exact).astype(np.int64)
    remainder = exact - shares
    largest = np.argsort(-remainder, kind="stable")[: free - int(shares.sum())]
    shares[largest] += 1
    shares += 1
    return shares
