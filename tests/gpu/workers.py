"""The processes of GPU tests: `python -m tests.gpu.workers FUNCTION FOLDER`, as in `tests.distributed`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from medalign import distributed
from medalign.engine import engine as door
from tests.distributed.workers import main
from tests.distributed.workers import scenarios as scenarios  # named on the command line


def collectives(_settings: dict[str, Any]) -> dict[str, Any]:
    """Run each collective of ZeRO and the trainer on one rank, where the output equals the input."""
    door.start({})
    device = distributed.device()
    given = torch.arange(6, dtype=torch.bfloat16, device=device)
    summed, gathered, scattered, broadcast = (
        given.clone(),
        torch.empty_like(given),
        torch.empty_like(given),
        given.clone(),
    )
    dist.all_reduce(summed)
    dist.all_gather_into_tensor(gathered, given)
    dist.reduce_scatter_tensor(scattered, given)
    dist.broadcast(broadcast, 0)
    dist.barrier()
    same = {
        name: torch.equal(tensor, given)
        for name, tensor in (
            ("all_reduce", summed),
            ("all_gather", gathered),
            ("reduce_scatter", scattered),
            ("broadcast", broadcast),
        )
    }
    backend = dist.get_backend()
    door.stop()
    return {"backend": backend, "same": same}


if __name__ == "__main__":
    main(globals())
