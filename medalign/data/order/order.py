"""Which sample is seen when: a function of the seed and the position alone, never of ranks or workers.

The order is one endless sequence: the permutation of epoch 0, then that of epoch 1, and so on. Global batch k is
positions [k G, (k + 1) G) of it, G the global batch. Where G does not divide the epoch, a batch takes the end of one
epoch and the beginning of the next: every sample is seen exactly once an epoch, and nothing is dropped or padded.

Any stretch of the sequence is computed by itself, so a run goes on from its number of samples alone. See `mixing`
for several data sets by weight and for batches of samples of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from medalign.errors import ConfigError

BLOCK = 65_536  # samples shuffled together by default: all of a small data set, about 65 shards of a large one
_SHARDS, _BLOCK = 1, 2  # what a generator is for; a word of its seed


class Order(Protocol):
    """An endless sequence of sample numbers."""

    @property
    def size(self) -> int:
        """Samples in all."""
        ...

    @property
    def epoch_size(self) -> int | None:
        """Positions after which every sample has come once more; None where there is no such number."""
        ...

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at these positions, int64 [n]."""
        ...


class GlobalOrder:
    """The endless sequence of one data set's sample numbers.

    In each epoch the shards are permuted and cut into blocks of about `block` samples; the samples of a block are
    shuffled together. So reading stays within a few shards at a time, and the memory is that of two blocks. A data set
    of up to `block` samples is one block: any order of its samples is as likely as any other.

    Args:
        size: samples in an epoch.
        seed: not negative.
        shuffle: False repeats 0, 1, ..., size - 1.
        shards: samples of each shard, in the order of the numbers; by default one shard holds all.
        block: samples shuffled together.
        stream: tells apart the orders of several data sets with one seed.
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
            raise ConfigError("the data set has no sample; name shards that hold at least one")
        if seed < 0:
            raise ConfigError(f"the seed is {seed}; it must not be negative")
        if block < 1:
            raise ConfigError(f"data.shuffle_block is {block}; at least 1 sample is shuffled at a time")
        self.size = size
        self.seed = seed
        self._shuffle = shuffle
        self._shards = np.asarray([size] if shards is None else shards, dtype=np.int64)
        if self._shards.sum() != size:
            raise ConfigError(f"the shards hold {self._shards.sum()} samples, not {size}")
        self._whole = size <= block or len(self._shards) == 1
        self._size_of_block = block
        self._stream = stream
        self._layout = lru_cache(2)(self._lay_out)
        self._shuffled = lru_cache(3)(self._shuffle_block)

    @property
    def epoch_size(self) -> int:
        """Every sample comes once in as many positions."""
        return self.size

    def take(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start to start + count - 1, int64 [count]. Nothing before `start` is replayed."""
        return self.indices_at(np.arange(start, start + count, dtype=np.int64))

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at these positions, int64 [n]."""
        epochs, places = np.divmod(positions, self.size)
        numbers = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self._in_epoch(int(epoch), places[here])
        return numbers

    def epoch(self, epoch: int) -> np.ndarray:
        """All sample numbers in the order of this epoch; from (seed, epoch) alone."""
        return self._in_epoch(epoch, np.arange(self.size, dtype=np.int64))

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if not self._shuffle:
            return places
        _, starts = self._layout(epoch)
        blocks = np.searchsorted(starts, places, side="right") - 1
        numbers = np.empty(len(places), dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            numbers[here] = self._shuffled(epoch, int(block))[places[here] - starts[block]]
        return numbers

    def _lay_out(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each block, and the place in the epoch at which each block starts."""
        order = np.arange(len(self._shards))
        if self._whole:
            return [order], np.zeros(1, np.int64)
        order = self._generator(epoch, _SHARDS).permutation(len(self._shards))
        order = order[self._shards[order] > 0]
        sizes = self._shards[order]
        shard_starts = np.cumsum(sizes) - sizes
        cuts = np.flatnonzero(np.diff(shard_starts // self._size_of_block)) + 1
        return np.split(order, cuts), shard_starts[np.concatenate([[0], cuts])]

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Sample numbers of a block in their order. Only here and in `_lay_out` is the order decided."""
        if self._whole:
            return self._generator(epoch).permutation(self.size)
        firsts = np.cumsum(self._shards) - self._shards
        shards = self._layout(epoch)[0][block]
        numbers = np.concatenate([np.arange(firsts[s], firsts[s] + self._shards[s]) for s in shards])
        return self._generator(epoch, _BLOCK, block).permutation(numbers)

    def _generator(self, epoch: int, purpose: int = 0, number: int = 0) -> np.random.Generator:
        return generator(self.seed, epoch, purpose, number, *([self._stream] if self._stream else []))

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_layout", "_shuffled")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._layout = lru_cache(2)(self._lay_out)
        self._shuffled = lru_cache(3)(self._shuffle_block)


def generator(*words: int) -> np.random.Generator:
    """Random numbers from these words alone, the same everywhere. Zeros at the end, up to four words, count not."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class StepPlan:
    """How a global batch of G samples is cut into the micro-batches of W ranks.

    Rank r takes the samples from r G // W to (r + 1) G // W, in as many micro-batches on every rank, none larger than
    `micro_batch`. Where W micro-batches do not divide G, their sizes differ by one, and where there are fewer samples
    than micro-batches some are empty: the trainer then runs one without weight, so that no rank waits for another.
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
        """Micro-batches of one rank in one step."""
        largest = -(-self.global_batch // self.world)
        return -(-largest // self.micro_batch)

    def micro_batches(self, step: int, rank: int) -> list[range]:
        """Positions of each micro-batch of this rank in this step; a rank's micro-batches are neighbors."""
        first, last = (self.global_batch * r // self.world for r in (rank, rank + 1))
        start, mine, parts = step * self.global_batch + first, last - first, self.accumulation
        return [range(start + mine * i // parts, start + mine * (i + 1) // parts) for i in range(parts)]
