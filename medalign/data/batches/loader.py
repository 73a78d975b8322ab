"""Data loaders for training (endless, step by step) and for evaluation (in order, once)."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.order.order import Order, StepPlan
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError, DataError, MedAlignError
from medalign.stop_signals import shield_worker

log = logging.getLogger("medalign")

MAX_REPLACEMENT_DISTANCE = 10_000  # samples tried after a bad one; if all are bad, the data set is unusable
MIN_SKIP_RATE_SAMPLES = 100  # a few bad samples at the start of a run are compared with this number of samples


class TrainLoader:
    """The micro-batches of this rank, step by step, without end.

    `order` alone determines the global batch of a step; `StepPlan` determines which part this rank takes. A sample that
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
        self._dataset = _MicroBatchDataset(index, collator)

    def __iter__(self) -> Iterator[list[Batch]]:
        micro_batches = iter(self._loader())
        while True:
            step = []
            for _ in range(self.plan.accumulation):
                batch = next(micro_batches)
                if isinstance(batch, MedAlignError):
                    raise batch
                step.append(batch)
            yield step

    def _loader(self) -> Iterable[Batch | MedAlignError]:
        return DataLoader(
            self._dataset,
            sampler=IndexSampler(self),
            batch_size=None,
            collate_fn=_identity,
            num_workers=self.workers,
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # a separate one, so that loading does not advance the trainer's generator
        )

    def micro_batch_indices(self) -> Iterator[MicroBatchIndices]:
        """Yield what this rank reads, see `rank_indices_and_prefetch`."""
        return rank_indices_and_prefetch(self.order, self.plan, self.rank, self.start_step, self.workers)


class ValidationLoader:
    """This rank's micro-batches of all held-out samples, in order, once per iteration.

    Micro-batch k goes to rank k modulo the ranks, so its samples do not depend on how many ranks there are. Every rank
    gets the same number; where a rank has none left, its last one is a batch without weight. A sample that cannot be
    used is replaced as in training.

    Args:
        micro_batch: samples of one forward pass.
        workers: reading processes; 0 reads in this one. The batches are the same.
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
    ) -> None:
        starts = range(0, len(index), micro_batch)
        parts = [list(range(start, min(start + micro_batch, len(index)))) for start in starts]
        parts += [[]] * (-len(parts) % world)
        self._parts = parts[rank::world]
        self._workers = workers
        self._reader = _MicroBatchDataset(index, collator)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        micro_batches = DataLoader(
            self._reader,
            sampler=[MicroBatchIndices(part, []) for part in self._parts],
            batch_size=None,
            collate_fn=_identity,
            num_workers=self._workers,
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # its own, so that loading draws nothing from the trainer's
        )
        for batch in micro_batches:
            if isinstance(batch, MedAlignError):
                raise batch
            yield batch


class MicroBatchIndices(NamedTuple):
    """Work for one reader."""

    indices: list[int]  # samples of a micro-batch
    next_indices: list[int]  # samples of the next micro-batch of this reader, to be prefetched


def rank_indices_and_prefetch(
    order: Order, plan: StepPlan, rank: int, start_step: int, workers: int
) -> Iterator[MicroBatchIndices]:
    """Yield the sample indices of each micro-batch of a rank, with those that the same worker reads next.

    Args:
        order: the order of the samples.
        plan: the partition of a global batch.
        rank: the rank.
        start_step: the first step.
        workers: number of reading processes.
    """
    readers = max(workers, 1)  # the DataLoader assigns micro-batches to its workers in turn
    indices = rank_indices(order, plan, rank, start_step)
    waiting = deque(itertools.islice(indices, readers))
    for later in indices:
        waiting.append(later)
        yield MicroBatchIndices(waiting.popleft(), later)


def rank_indices(order: Order, plan: StepPlan, rank: int, start_step: int = 0) -> Iterator[list[int]]:
    """Yield the sample indices of each micro-batch of a rank, from step `start_step` on, without end."""
    for step in itertools.count(start_step):
        for piece in plan.micro_batches(step, rank):
            yield order.indices_at(np.arange(piece.start, piece.stop, dtype=np.int64)).tolist()


def check_skip_rate(
    skipped: int,
    seen: int,
    max_fraction: float,
    last_reasons: Sequence[str] = (),
    setting: str = "data.max_skip_fraction",
) -> None:
    """Check that not too many samples were skipped since the start of the run.

    Until MIN_SKIP_RATE_SAMPLES samples were seen, the limit is that for MIN_SKIP_RATE_SAMPLES samples.

    Args:
        skipped: skipped samples of all ranks.
        seen: samples drawn by all ranks.
        max_fraction: largest allowed fraction of skipped samples.
        last_reasons: why samples of this rank were skipped, for the message.
        setting: the user's name of `max_fraction`, for the message.

    Raises:
        DataError: the fraction is above `max_fraction`.
    """
    if skipped > max_fraction * max(seen, MIN_SKIP_RATE_SAMPLES):
        reasons = f"the last were {'; '.join(last_reasons[-3:])}" if last_reasons else "see the log of the other ranks"
        raise DataError(
            f"{skipped} of {seen} samples could not be used, more than {setting} {max_fraction}; {reasons}. "
            f"Repair or repack the shards, or raise {setting}"
        )


class IndexSampler:
    """Sampler of the DataLoader. It runs in the trainer's process, so that workers do not hold the order."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        return self._loader.micro_batch_indices()


class _MicroBatchDataset(Dataset[Any]):
    """Reads a micro-batch. Errors are returned, not raised, because a worker would obscure their message."""

    def __init__(self, index: ShardIndex, collator: Collator) -> None:
        self._index = index
        self._collator = collator

    def __getitem__(self, work: MicroBatchIndices) -> Batch | MedAlignError:
        skipped: list[str] = []
        try:
            self._index.prefetch([*work.indices, *work.next_indices])
            prepared = [self._read_or_replace(index, skipped) for index in work.indices]
            batch = self._collator.join(prepared) if prepared else self._collator.dummy_batch()
        except MedAlignError as error:
            return error
        return replace(batch, skipped=tuple(skipped))

    def _read_or_replace(self, index: int, skipped: list[str]) -> Prepared:
        """Prepare the sample, or the next one that can be used. Only the reason for the first one is recorded."""
        size = len(self._index)
        tries = min(size, MAX_REPLACEMENT_DISTANCE)
        reason = ""
        for step in range(tries):
            try:
                sample = self._index.read((index + step) % size, self._collator.pixels)
                prepared = _prepared(self._collator, sample)
            except BadSample as error:
                reason = reason or str(error)
                continue
            if reason:
                skipped.append(reason)
            return prepared
        raise DataError(f"none of the {tries} samples from index {index} on can be used; the first reason: {reason}")


def _prepared(collator: Collator, sample: Sample) -> Prepared:
    """Prepare a sample for a batch. Raises BadSample if template, tokenizer or preprocessing reject it."""
    with as_bad_sample(f"{sample.shard}/{sample.key}"):
        return collator.prepare(sample)


def _identity(batch: Any) -> Any:
    return batch


def batches(
    index: ShardIndex, collator: Collator, batch_size: int, indices: Sequence[int] | None = None
) -> Iterator[tuple[tuple[Sample, ...], Batch]]:
    """Yield every sample exactly once, in order, with its batch, for generation or scoring.

    A sample that cannot be used is in no batch; it is logged and named in `skipped` of the current batch.

    Args:
        index: the samples.
        collator: prepares and joins samples.
        batch_size: samples per batch; the last batch may have fewer.
        indices: the samples to read; None reads all.

    Raises:
        DataError: no sample can be used, or a shard is lost.
    """
    selected = range(len(index)) if indices is None else indices
    samples: list[Sample] = []
    prepared: list[Prepared] = []
    skipped: list[str] = []
    for i in selected:
        try:
            sample = index.read(i)
            ready = _prepared(collator, sample)
        except BadSample as error:
            log.warning("bad sample skipped: %s", error)
            skipped.append(str(error))
            continue
        if len(samples) == batch_size:  # yielded late, so that no bad sample comes after the last batch
            yield tuple(samples), replace(collator.join(prepared), skipped=tuple(skipped))
            samples, prepared, skipped = [], [], []
        samples.append(sample)
        prepared.append(ready)
    if samples:
        yield tuple(samples), replace(collator.join(prepared), skipped=tuple(skipped))
    elif len(selected):
        raise DataError(f"none of the {len(selected)} samples can be used; the first reason: {skipped[0]}")
