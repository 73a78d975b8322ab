"""Which sample is seen when: a function of the seed and the position alone, never of ranks or workers.

The order is one endless sequence: the permutation of epoch 0, then that of epoch 1, and so on. Global batch k is
positions [k G, (k + 1) G) of it, G the global batch. Where G does not divide the epoch, a batch takes the end of one
epoch and the beginning of the next: every sample is seen exactly once an epoch, and nothing is dropped or padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medalign.errors import ConfigError


@dataclass
class GlobalOrder:
    """The endless sequence of sample numbers.

    Args:
        size: samples in an epoch.
        seed: not negative.
        shuffle: False repeats 0, 1, ..., size - 1.
    """

    size: int
    seed: int
    shuffle: bool = True
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)  # the two latest

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError("the data set has no sample; name shards that hold at least one")
        if self.seed < 0:
            raise ConfigError(f"the seed is {self.seed}; it must not be negative")

    def take(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start to start + count - 1, int64 [count]. Nothing before `start` is replayed."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        numbers = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self.epoch(int(epoch))[places[here]]
        return numbers

    def epoch(self, epoch: int) -> np.ndarray:
        """All sample numbers in the order of this epoch; from (seed, epoch) alone. Only here is the order decided."""
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
            kept = dict(list(self._epochs.items())[-1:])
            self._epochs = {**kept, epoch: order}
        return self._epochs[epoch]


@dataclass(frozen=True)
class StepPlan:
    """How a global batch is cut into the micro-batches of the ranks. Raises ConfigError if it cannot be cut evenly."""

    global_batch: int
    micro_batch: int
    world: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.world) < 1 or self.global_batch % (
            self.micro_batch * self.world
        ):
            raise ConfigError(
                f"the global batch {self.global_batch} is not a multiple of micro-batch {self.micro_batch} x "
                f"{self.world} ranks = {self.micro_batch * self.world}; change one of the three"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch // (self.micro_batch * self.world)

    def starts(self, step: int, rank: int) -> list[int]:
        """First position of each micro-batch of this rank in this step; a rank's micro-batches are neighbours."""
        first = step * self.global_batch + rank * (self.global_batch // self.world)
        return [first + i * self.micro_batch for i in range(self.accumulation)]
