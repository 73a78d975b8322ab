"""Data loaders for training (endless, step by step) and for validation (in order, once); batches of questions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.indices import MicroBatchIndices, rank_indices_and_prefetch
from medalign.data.batches.reader import MicroBatchDataset, prepare
from medalign.data.order.order import Order, StepPlan
from medalign.data.samples.sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError, MedAlignError
from medalign.stop_signals import hold_stop_signals, shield_worker

log = logging.getLogger("medalign")


class TrainLoader:
    """The micro-batches of this rank, step by step, without end.

    Only `order` determines the global batch of a step; `StepPlan` determines which part this rank takes. A sample that
    cannot be used is replaced by the next index that can (the first follows the last) and named in `Batch.skipped`.
    `check_skip_rate` raises if there are too many. The iterator raises DataError if a shard is lost, or if
    MAX_REPLACEMENT_DISTANCE consecutive samples cannot be used.

    Args:
        index: the samples.
        order: the order of the samples.
        collator: prepares and joins samples.
        global_batch: samples per step over all ranks.
        micro_batch: samples per forward pass.
        rank: this rank.
        world: number of ranks.
        start_step: the first step to return.
        workers: number of reading processes; 0 reads in this one. The batches are the same.

    Raises:
        ConfigError: order and index differ in size, or a batch size is invalid.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        collator: Collator,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        workers: int = 0,
    ) -> None:
        if order.size != len(index):
            raise ConfigError(f"the order is for {order.size} samples, but the shards contain {len(index)}")
        self.plan = StepPlan(global_batch, micro_batch, world)
        self.order = order
        self.rank = rank
        self.start_step = start_step
        self.workers = workers
        self._dataset = MicroBatchDataset(index, collator)

    def __iter__(self) -> Iterator[list[Batch]]:
        micro_batches = _read(self._dataset, IndexSampler(self), self.workers)
        while True:
            yield [next(micro_batches) for _ in range(self.plan.accumulation)]

    def micro_batch_indices(self) -> Iterator[MicroBatchIndices]:
        """Yield what this rank reads, see `rank_indices_and_prefetch`."""
        return rank_indices_and_prefetch(self.order, self.plan, self.rank, self.start_step, self.workers)


class ValidationLoader:
    """This rank's micro-batches of all held-out samples, in order, once per iteration.

    Micro-batch k goes to rank k modulo `world`, so its samples do not depend on the number of ranks. Every rank gets
    the same number of micro-batches; if a rank has none left, its last one is a dummy batch with weight 0. A sample
    that cannot be used is replaced as in training.

    Args:
        index: the samples.
        collator: prepares and joins samples.
        micro_batch: samples per forward pass.
        rank: this rank.
        world: number of ranks.
        workers: number of reading processes; 0 reads in this one. The batches are the same.
        adjacent: give each rank consecutive micro-batches instead.
    """

    def __init__(
        self,
        index: ShardIndex,
        collator: Collator,
        *,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        adjacent: bool = False,
    ) -> None:
        starts = range(0, len(index), micro_batch)
        parts = [list(range(start, min(start + micro_batch, len(index)))) for start in starts]
        parts += [[]] * (-len(parts) % world)
        share = len(parts) // world
        self._parts = parts[rank * share :][:share] if adjacent else parts[rank::world]
        self._workers = workers
        self._dataset = MicroBatchDataset(index, collator)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        return _read(self._dataset, [MicroBatchIndices(part, []) for part in self._parts], self._workers)


class IndexSampler:
    """Sampler of the DataLoader. It runs in the trainer's process, so that workers do not hold the order."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        return self._loader.micro_batch_indices()


def _read(dataset: MicroBatchDataset, sampler: Iterable[MicroBatchIndices], workers: int) -> Iterator[Batch]:
    """Yield the micro-batches of a sampler, and raise the first error that the dataset returns."""
    loader: DataLoader[Batch | MedAlignError] = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # a separate one, so that loading does not advance the trainer's generator
    )
    with hold_stop_signals():
        micro_batches = iter(loader)
    for batch in micro_batches:
        if isinstance(batch, MedAlignError):
            raise batch
        yield batch


def _identity(batch: Any) -> Any:
    return batch


def join_usable(
    collator: Collator, samples: Sequence[Sample | BadSample]
) -> tuple[list[int], Batch | None, tuple[str, ...]]:
    """Join the samples that can be used, each exactly once, for generation or scoring.

    Args:
        collator: prepares and joins samples.
        samples: samples, or why they could not be read.

    Returns:
        The places of the samples in the batch; the batch, or None if no sample can be used; and the reasons for the
        others, which are logged, too.
    """
    places: list[int] = []
    prepared: list[Prepared] = []
    skipped: list[str] = []
    for place, sample in enumerate(samples):
        try:
            if isinstance(sample, BadSample):
                raise sample
            prepared.append(prepare(collator, sample))
            places.append(place)
        except BadSample as error:
            log.warning("bad sample skipped: %s", error)
            skipped.append(str(error))
    return places, collator.join(prepared) if prepared else None, tuple(skipped)
