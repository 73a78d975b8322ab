"""The sample indices of each micro-batch of a rank, from the order of the samples and the plan of a step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from medalign.data.order.order import Order, StepPlan


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
