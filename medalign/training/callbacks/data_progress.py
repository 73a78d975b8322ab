"""How far a run is in its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medalign.data.order.order import Order
from medalign.training.trainer import Callback, Trainer

_CHUNK = 65_536  # positions that are looked up at once, where a run resumes


class DataProgress(Callback):
    """Adds `train/epoch` and the samples of each folder, `data/source_N_samples`, to the rows.

    Folders have numbers, in the order of `data.train`, because their names may identify patients. A mixture by weight
    has no epoch. A sample that replaces a bad one counts for the folder of the bad one. Batches that a rewind has left
    out count too.

    Args:
        order: the order of the samples.
        sizes: number of samples of each folder.
    """

    def __init__(self, order: Order, sizes: Sequence[int]) -> None:
        self._order = order
        self._ends = np.cumsum(sizes)
        self._counts = np.zeros(len(sizes), dtype=np.int64)
        self._counted = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """Count anew: the run may have gone back."""
        self._counts[:] = self._counted = 0

    def metrics(self, trainer: Trainer) -> Mapping[str, float]:
        """Return the progress up to the step that is done."""
        skipped, found = trainer.state.skipped_batches * trainer.config.train.batch_size, {}
        samples = trainer.state.samples + skipped
        if self._order.epoch_size:
            found["train/epoch"] = samples / self._order.epoch_size
        if len(self._counts) > 1:
            self._count_up_to(samples)
            found |= {f"data/source_{i}_samples": int(count) for i, count in enumerate(self._counts)}
        return found

    def _count_up_to(self, samples: int) -> None:
        for start in range(self._counted, samples, _CHUNK):
            indices = self._order.indices_at(np.arange(start, min(start + _CHUNK, samples), dtype=np.int64))
            sources = np.searchsorted(self._ends, indices, side="right")
            self._counts += np.bincount(sources, minlength=len(self._counts))
        self._counted = samples
