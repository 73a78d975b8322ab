"""The order of samples: a function of the seed and the position only, independent of ranks and workers.

The order is an endless sequence: the permutation of epoch 0, then that of epoch 1, and so on. With a global batch of G
samples, global batch k takes the positions [k G, (k + 1) G). If G does not divide the epoch, a batch takes the end of
one epoch and the beginning of the next. Every sample is used exactly once per epoch; nothing is dropped or padded.

Any range of the sequence is computed by itself, so a run resumes from its number of samples. `mixture` has weighted
mixtures of data sets, and batches of samples of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from medalign.errors import ConfigError

BLOCK = 65_536  # samples shuffled together by default: all of a small data set, about 65 shards of a large one
_SHARDS, _BLOCK = 1, 2  # purpose of a generator; part of its seed


class Order(Protocol):
    """An endless sequence of sample indices."""

    @property
    def size(self) -> int:
        """Total number of samples."""
        ...

    @property
    def epoch_size(self) -> int | None:
        """Number of positions in which every sample occurs once, or None if the order has no period."""
        ...

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample indices at these positions, int64 [n]."""
        ...


class GlobalOrder:
    """The endless sequence of the sample indices of one data set.

    In each epoch the shards are permuted and grouped into blocks of about `block` samples; the samples of a block are
    shuffled together. So reading stays within a few shards at a time, and memory is limited to two blocks. A data
    set of up to `block` samples is a single block, in which all orders are equally likely.

    Args:
        size: samples per epoch.
        seed: not negative.
        shuffle: False repeats 0, 1, ..., size - 1.
        shards: number of samples of each shard, in index order; None puts all samples in one shard.
        block: samples shuffled together.
        stream: distinguishes the orders of several data sets with the same seed.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        shuffle: bool = True,
        *,
        shards: Sequence[int] | np.ndarray | None = None,
        block: int = BLOCK,
        stream: int = 0,
    ) -> None:
        if size < 1:
            raise ConfigError("the data set has no samples; name shards that contain at least one")
        if seed < 0:
            raise ConfigError(f"the seed is {seed}; it must not be negative")
        if block < 1:
            raise ConfigError(f"data.shuffle_block is {block}; it must be at least 1")
        self.size = size
        self.seed = seed
        self._shuffle = shuffle
        self._shards = np.asarray([size] if shards is None else shards, dtype=np.int64)
        if self._shards.sum() != size:
            raise ConfigError(f"the shards contain {self._shards.sum()} samples, not {size}")
        self._single_block = size <= block or len(self._shards) == 1
        self._block_size = block
        self._stream = stream
        self._layout = lru_cache(2)(self._lay_out)
        self._shuffled = lru_cache(3)(self._shuffle_block)

    @property
    def epoch_size(self) -> int:
        """Number of positions in which every sample occurs once."""
        return self.size

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the sample indices at positions start to start + count - 1, int64 [count], without a replay."""
        return self.indices_at(np.arange(start, start + count, dtype=np.int64))

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample indices at these positions, int64 [n]."""
        epochs, offsets = np.divmod(positions, self.size)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._in_epoch(int(epoch), offsets[here])
        return indices

    def epoch(self, epoch: int) -> np.ndarray:
        """Return all sample indices in the order of this epoch, int64 [size]."""
        return self._in_epoch(epoch, np.arange(self.size, dtype=np.int64))

    def _in_epoch(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        if not self._shuffle:
            return offsets
        _, starts = self._layout(epoch)
        blocks = np.searchsorted(starts, offsets, side="right") - 1
        indices = np.empty(len(offsets), dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            indices[here] = self._shuffled(epoch, int(block))[offsets[here] - starts[block]]
        return indices

    def _lay_out(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shards of each block, and offset in the epoch at which each block starts."""
        order = np.arange(len(self._shards))
        if self._single_block:
            return [order], np.zeros(1, np.int64)
        order = self._generator(epoch, _SHARDS).permutation(len(self._shards))
        order = order[self._shards[order] > 0]
        sizes = self._shards[order]
        shard_starts = np.cumsum(sizes) - sizes
        cuts = np.flatnonzero(np.diff(shard_starts // self._block_size)) + 1
        return np.split(order, cuts), shard_starts[np.concatenate([[0], cuts])]

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Sample indices of a block in order. Only this method and `_lay_out` decide the order."""
        if self._single_block:
            return self._generator(epoch).permutation(self.size)
        firsts = np.cumsum(self._shards) - self._shards
        shards = self._layout(epoch)[0][block]
        indices = np.concatenate([np.arange(firsts[s], firsts[s] + self._shards[s]) for s in shards])
        return self._generator(epoch, _BLOCK, block).permutation(indices)

    def _generator(self, epoch: int, purpose: int = 0, block: int = 0) -> np.random.Generator:
        return generator(self.seed, epoch, purpose, block, *([self._stream] if self._stream else []))

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_layout", "_shuffled")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._layout = lru_cache(2)(self._lay_out)
        self._shuffled = lru_cache(3)(self._shuffle_block)


def generator(*words: int) -> np.random.Generator:
    """Return a random generator seeded with these words, identical on every machine.

    With up to four words, trailing zeros do not change the result.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class StepPlan:
    """The partition of a global batch of G samples into the micro-batches of W ranks.

    Rank r takes the samples from r G // W to (r + 1) G // W, in the same number of micro-batches on every rank, none
    larger than `micro_batch`. If W micro-batches do not divide G, their sizes differ by one. If there are fewer samples
    than micro-batches, some are empty: the trainer then runs a dummy batch with weight 0, so that no rank waits.

    Raises:
        ConfigError: a value is below 1.
    """

    global_batch: int
    micro_batch: int
    world: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.world) < 1:
            raise ConfigError(
                f"global batch {self.global_batch}, micro-batch {self.micro_batch} and ranks {self.world} must be at "
                "least 1"
            )

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per rank and step."""
        largest = -(-self.global_batch // self.world)
        return -(-largest // self.micro_batch)

    def micro_batches(self, step: int, rank: int) -> list[range]:
        """Positions of each micro-batch of this rank in this step; the micro-batches of a rank are consecutive."""
        first, last = (self.global_batch * r // self.world for r in (rank, rank + 1))
        start, mine, parts = step * self.global_batch + first, last - first, self.accumulation
        return [range(start + mine * i // parts, start + mine * (i + 1) // parts) for i in range(parts)]
