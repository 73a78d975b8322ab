"""Batches for training (endless, by steps) and for evaluation (in order, once)."""

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
from medalign.data.samples.faults import decoding
from medalign.data.samples.sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError, DataError, MedAlignError

log = logging.getLogger("medalign")

REPLACED_WITHIN = 10_000  # samples from a bad one on; beyond them the data are lost rather than one sample
JUDGED_AFTER = 100  # samples; fewer bad ones than max_bad_share of so many are always borne


class TrainLoader:
    """This rank's micro-batches, step after step, without end.

    The global batch of a step is fixed by `order` alone; `StepPlan` says which part this rank takes. A sample that
    cannot be used is replaced by the next sample number that can (the first after the last), and named in
    `Batch.skipped`; `check_skip_rate` says when there are too many. DataError is raised when a shard is lost, or where
    REPLACED_WITHIN samples in a row cannot be used.

    Args:
        global_batch, micro_batch: samples of a step over all ranks, and of one forward pass.
        start_step: the first step to give.
        workers: reading processes; 0 reads in this one. The batches are the same.
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
            raise ConfigError(f"the order is made for {order.size} samples, the shards hold {len(index)}")
        self.plan = StepPlan(global_batch, micro_batch, world)
        self.order = order
        self.rank = rank
        self.start_step = start_step
        self.workers = workers
        self._reader = _Reader(index, collator)

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
            self._reader,
            sampler=IndexSampler(self),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self.workers,
            generator=torch.Generator(),  # its own, so that loading draws nothing from the trainer's
        )

    def draws(self) -> Iterator[MicroBatchIndices]:
        """What this rank reads, as in `rank_indices_and_prefetch`."""
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
        self._reader = _Reader(index, collator)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        micro_batches = DataLoader(
            self._reader,
            sampler=[MicroBatchIndices(part, []) for part in self._parts],
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self._workers,
            generator=torch.Generator(),  # its own, so that loading draws nothing from the trainer's
        )
        for batch in micro_batches:
            if isinstance(batch, MedAlignError):
                raise batch
            yield batch


class MicroBatchIndices(NamedTuple):
    """Work for one reader."""

    numbers: list[int]  # samples of a micro-batch
    ahead: list[int]  # samples of the reader's next one


def rank_indices_and_prefetch(
    order: Order, plan: StepPlan, rank: int, start_step: int, workers: int
) -> Iterator[MicroBatchIndices]:
    """What a rank reads, micro-batch after micro-batch, each with what the same worker reads after it."""
    turn = max(workers, 1)  # the DataLoader deals micro-batches to its workers in turn
    numbers = rank_numbers(order, plan, rank, start_step)
    waiting = deque(itertools.islice(numbers, turn))
    for later in numbers:
        waiting.append(later)
        yield MicroBatchIndices(waiting.popleft(), later)


def rank_numbers(order: Order, plan: StepPlan, rank: int, start_step: int = 0) -> Iterator[list[int]]:
    """Sample numbers of each micro-batch of a rank, from the first step on, without end."""
    for step in itertools.count(start_step):
        for piece in plan.micro_batches(step, rank):
            yield order.indices_at(np.arange(piece.start, piece.stop, dtype=np.int64)).tolist()


def check_skip_rate(
    bad: int, seen: int, most: float, last: Sequence[str] = (), setting: str = "data.max_skip_fraction"
) -> None:
    """Raises DataError when more than `most` of the samples that all ranks drew since the run began were bad.

    The first JUDGED_AFTER samples are judged as so many. `last` names bad samples of this rank,
    `setting` what the user calls `most`.
    """
    if bad > most * max(seen, JUDGED_AFTER):
        named = f"the last were {'; '.join(last[-3:])}" if last else "the log of the other ranks names them"
        raise DataError(
            f"{bad} of {seen} samples could not be used, more than {setting} {most}; {named}. "
            "Repair or repack the shards, or raise the share"
        )


class IndexSampler:
    """The sampler of the DataLoader: made in the trainer's process, so that workers hold no order."""

    def __init__(self, loader: TrainLoader) -> None:
        self._source = loader

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        return self._source.draws()


class _Reader(Dataset):
    """Sample numbers to a batch. Errors are given back, not raised: a worker would bury their message."""

    def __init__(self, index: ShardIndex, collator: Collator) -> None:
        self._index = index
        self._collator = collator

    def __getitem__(self, draw: MicroBatchIndices) -> Batch | MedAlignError:
        skipped: list[str] = []
        try:
            self._index.prefetch([*draw.numbers, *draw.ahead])
            prepared = [self._prepare(number, skipped) for number in draw.numbers]
            batch = self._collator.join(prepared) if prepared else self._collator.dummy_batch()
        except MedAlignError as error:
            return error
        return replace(batch, skipped=tuple(skipped))

    def _prepare(self, number: int, skipped: list[str]) -> Prepared:
        """The sample, or the next one that can be used. Only the one that was drawn is listed."""
        size = len(self._index)
        sought = min(size, REPLACED_WITHIN)
        reason = ""
        for step in range(sought):
            try:
                sample = self._index.read((number + step) % size, self._collator.pixels)
                prepared = _prepared(self._collator, sample)
            except BadSample as error:
                reason = reason or str(error)
                continue
            if reason:
                skipped.append(reason)
            return prepared
        raise DataError(f"none of the {sought} samples from number {number} on can be used; the first reason: {reason}")


def _prepared(collator: Collator, sample: Sample) -> Prepared:
    """The sample, ready for a batch. Raises BadSample for one that template, tokenizer or view cannot take."""
    with decoding(f"{sample.shard}/{sample.key}"):
        return collator.prepare(sample)


def _as_is(batch: Any) -> Any:
    return batch


def batches(
    index: ShardIndex, collator: Collator, batch_size: int, indices: Sequence[int] | None = None
) -> Iterator[tuple[tuple[Sample, ...], Batch]]:
    """Every sample (or those of `indices`) exactly once, in order, with its batch; to generate from, or to score.

    A sample that cannot be used is in no batch: it is logged and named in `skipped` of the batch at hand. Raises
    DataError if none can be used, or a shard is lost.
    """
    numbers = range(len(index)) if indices is None else indices
    samples: list[Sample] = []
    prepared: list[Prepared] = []
    skipped: list[str] = []
    for number in numbers:
        try:
            sample = index.read(number)
            ready = _prepared(collator, sample)
        except BadSample as error:
            log.warning("bad sample left out: %s", error)
            skipped.append(str(error))
            continue
        if len(samples) == batch_size:  # given out late, so that no bad sample comes after the last batch
            yield tuple(samples), replace(collator.join(prepared), skipped=tuple(skipped))
            samples, prepared, skipped = [], [], []
        samples.append(sample)
        prepared.append(ready)
    if samples:
        yield tuple(samples), replace(collator.join(prepared), skipped=tuple(skipped))
    elif len(numbers):
        raise DataError(f"none of the {len(numbers)} samples can be used; the first reason: {skipped[0]}")
