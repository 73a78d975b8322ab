"""Ranks that share a queue: each piece is taken once, and any rank can stop all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from medalign.work_queue import WorkQueue, joined_ranks


def test_each_piece_is_taken_once():
    store = dist.HashStore()

    def take(_: int) -> list[int]:
        return list(WorkQueue(store, "work", 50))

    with ThreadPoolExecutor(4) as ranks:
        taken = list(ranks.map(take, range(4)))
    assert sorted(piece for mine in taken for piece in mine) == list(range(50))
    assert all(mine == sorted(mine) for mine in taken)


def test_any_rank_stops_all_after_what_they_have_taken():
    store = dist.HashStore()
    mine, other = (WorkQueue(store, "work", 9) for _ in range(2))
    pieces = iter(mine)
    assert next(pieces) == 0 and not mine.stop_reason
    other.stop("Terminated")
    assert list(pieces) == [] and list(other) == [] and mine.stop_reason == "Terminated"
    assert list(WorkQueue(store, "other work", 2)) == [0, 1]


def test_counters_are_those_of_all_ranks():
    store = dist.HashStore()
    mine, other = (WorkQueue(store, "work", 9) for _ in range(2))
    assert (mine.add("seen", 3), other.add("seen", 4), mine.add("seen", 0), mine.add("unreadable", 0)) == (3, 7, 7, 0)


def test_one_rank_needs_no_process_group():
    with joined_ranks() as store:
        assert list(WorkQueue(store, "work", 2)) == [0, 1] and not dist.is_initialized()
