"""The training loaders of all ranks together read one sequence, however it is divided."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medalign.data.batches.indices import rank_indices
from medalign.data.batches.loader import TrainLoader
from medalign.data.order.mixture import LengthGroupedOrder, Mixture
from medalign.data.order.order import GlobalOrder, Order, StepPlan
from tests.unit.data.batches.test_loader import loader

WORLDS, WORKERS = (1, 2, 3, 8, 64, 512), (0, 1, 4)


class Sized:
    """An index that only has a size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def orders(kind: str, folders: list[list[int]], batch: int) -> Order:
    """A new order over the shards of these folders."""
    sizes = [sum(shards) for shards in folders]
    order: Order = GlobalOrder(sum(sizes), 5, shards=[n for shards in folders for n in shards], block=50)
    if kind.endswith("mixture"):
        several = [GlobalOrder(sum(s), 5, shards=s, block=50, stream=d) for d, s in enumerate(folders)]
        order = Mixture(several, list(range(1, len(folders) + 1)), 5)
    if kind.startswith("grouped"):
        lengths = np.random.default_rng(0).integers(1, 99, sum(sizes))
        order = LengthGroupedOrder(order, lambda numbers: lengths[numbers], global_batch=batch, groups=3, seed=5)
    return order


@pytest.mark.parametrize("kind", ["plain", "mixture", "grouped", "grouped mixture"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    folders=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), min_size=1, max_size=3),
    batch=st.integers(1, 70),
    micro=st.integers(1, 8),
    world=st.sampled_from(WORLDS),
    skip=st.sampled_from([0, 1, 4, 1000]),
)
def test_all_ranks_and_workers_draw_one_sequence(kind, folders, batch, micro, world, skip) -> None:
    size, steps = sum(map(sum, folders)), 3
    plan = StepPlan(batch, micro, world)
    whole = (
        orders(kind, folders, batch).indices_at(np.arange(skip * batch, (skip + steps) * batch)).reshape(steps, batch)
    )
    order = orders(kind, folders, batch)
    cut = [
        list(islice(rank_indices(order, plan, rank, skip), (steps + 4) * plan.accumulation)) for rank in range(world)
    ]
    for step in range(steps):
        mine = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        assert [n for rank in cut for piece in rank[mine] for n in piece] == whole[step].tolist()
    for rank in {0, world // 2, world - 1}:
        for workers in WORKERS:  # each reader gets its micro-batch and the next one
            turn = max(workers, 1)
            settings_ = {"global_batch": batch, "micro_batch": micro, "start_step": skip, "workers": workers}
            # Its own order, as every process has one.
            own = orders(kind, folders, batch)
            ready = TrainLoader(Sized(size), own, None, rank=rank, world=world, **settings_)  # type: ignore[arg-type]
            draws = list(islice(ready.micro_batch_indices(), steps * plan.accumulation))
            assert [draw.indices for draw in draws] == cut[rank][: len(draws)]
            assert [draw.next_indices for draw in draws] == cut[rank][turn : turn + len(draws)]


@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_an_epoch_of_all_ranks_holds_every_sample_once(kind: str) -> None:
    folders, batch = [[40, 0, 31], [57]], 8
    for world in (1, 3, 8):
        plan = StepPlan(batch, 3, world)
        order = orders(kind, folders, batch)
        ranks = [islice(rank_indices(order, plan, rank), 16 * plan.accumulation) for rank in range(world)]
        assert sorted(n for rank in ranks for piece in rank for n in piece) == list(range(128))


def test_reading_processes_return_the_batches_in_order(shards: Path) -> None:
    """Two ranks with real workers read the global batches of one rank without workers."""
    alone = [[key for b in step for key in b.keys] for step in islice(loader(shards, micro_batch=6), 5)]
    for workers in WORKERS:
        ranks = [islice(loader(shards, micro_batch=1, rank=r, world=2, workers=workers), 5) for r in (0, 1)]
        steps = [[key for step in ranked for b in step for key in b.keys] for ranked in zip(*ranks, strict=True)]
        assert steps == alone
