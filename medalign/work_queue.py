"""Work that the ranks share without waiting for each other: each takes the next piece that nobody has taken.

The ranks agree through a key-value store of torch.distributed, so no collective operation is needed before the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from medalign import distributed
from medalign.errors import ConfigError

_STOP = "stop"


@contextmanager
def joined_ranks() -> Iterator[dist.Store]:
    """Join the ranks of the launcher inside the context, and yield their store. Every rank must enter it.

    Without a launcher there is one rank, and no process group.

    Raises:
        ConfigError: the port at which rank 0 listens is in use.
    """
    distributed.adopt_launcher()
    if distributed.world_size() == 1:
        yield dist.HashStore()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.local_rank())
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=distributed.TIMEOUT))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of this machine is in use, probably by another job (the deepspeed "
            "launcher always takes 29500): add --master_port N before --module, with another number for each job"
        ) from error
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=distributed.TIMEOUT)
    try:
        yield store
    finally:
        dist.destroy_process_group()


class WorkQueue:
    """Pieces of work, numbered from 0, of which each rank takes the next one; and what the ranks tell each other.

    Args:
        store: the store of all ranks.
        name: of this queue, unique in the store.
        pieces: number of pieces.
    """

    def __init__(self, store: dist.Store, name: str, pieces: int) -> None:
        self._store = dist.PrefixStore(name, store)
        self._pieces = pieces

    def __iter__(self) -> Iterator[int]:
        """Yield pieces until none is left, or a rank has asked all to stop."""
        while not self.stop_reason and (piece := self._store.add("taken", 1) - 1) < self._pieces:
            yield piece

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter of all ranks, and return the sum."""
        total: int = self._store.add(counter, amount)
        return total

    def stop(self, reason: str) -> None:
        """Ask all ranks to take no further piece."""
        self._store.set(_STOP, reason)

    @property
    def stop_reason(self) -> str:
        """Why a rank has asked all to stop; "" if none has."""
        return self._store.get(_STOP).decode() if self._store.check([_STOP]) else ""
