"""All checks in order, on one rank or on all ranks of a job."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch.distributed as dist

from medalign import distributed
from medalign.config import Config
from medalign.doctor import kernels, machine, models, network, storage
from medalign.doctor.finding import SEVERITY, Check, Finding, examine


def diagnose(config: Config, nodes: int | None = None, gpus: int | None = None) -> Iterator[Finding]:
    """Run all checks on this machine. No check writes anything that stays.

    Inside a job with several ranks every rank must call it. Rank 0 then yields one finding per check, with the worst
    status of all ranks and the host of the rank that has it; the other ranks yield only errors of their own connection.

    Args:
        config: the run's settings.
        nodes: nodes of the planned run; by default those of this job.
        gpus: GPUs per node of the planned run.
    """
    world = (nodes or 1) * gpus if gpus else distributed.world_size() * (nodes or 1)
    checks = _checks(config, world, gpus)
    if distributed.world_size() == 1:
        for name, check in checks.items():
            yield examine(name, check)
        return
    stores: list[dist.TCPStore] = []

    def connect() -> Finding:
        stores.append(network.meet())
        return network.check_ports(stores[0])

    ports = examine("ports", connect)
    found = [*(examine(name, check) for name, check in checks.items()), ports]
    if not stores:
        yield from found if distributed.is_main() else [ports]
        return
    try:
        yield from _gather(stores[0], found)
    except RuntimeError as error:  # torch's, if a rank ends or takes longer than the store waits
        text = str(error).partition("\n")[0]
        yield Finding("ports", "error", f"a rank has not reported: {text}", "see the messages of the other ranks")


def _checks(config: Config, world: int, gpus: int | None) -> dict[str, Check]:
    return {
        "versions": machine.check_versions,
        "gpu": lambda: machine.check_gpu(gpus),
        "attention": lambda: machine.check_attention(config),
        "communication": machine.check_communication,
        "run folder": lambda: storage.check_run_folder(config),
        "batch": lambda: models.check_batch(config, world),
        "student": lambda: models.check_student_folder(config),
        "space": lambda: storage.check_space(config),
        "shards": lambda: storage.check_shards(config),
        "template": lambda: models.check_template(config),
        "teacher": lambda: models.check_teacher(config),
        "grids": lambda: models.check_grids(config),
        "kernels": lambda: kernels.check_kernels(config),
        "wandb": lambda: network.check_wandb(config),
    }


def _gather(store: dist.TCPStore, found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield the merged findings on rank 0, and nothing on the others. Every rank must call it."""
    rank, world = distributed.rank(), distributed.world_size()
    store.set(f"found/{rank}", json.dumps([asdict(one) for one in found]))
    if rank == 0:
        hosts = {str(rank): socket.gethostname()}
        rows = [[Finding(**one) for one in json.loads(store.get(f"found/{other}"))] for other in range(world)]
        for other in range(1, world):
            hosts[str(other)] = store.get(f"host/{other}").decode()
        yield from (_merge(ranks, hosts) for ranks in zip(*rows, strict=True))
        store.wait([f"done/{other}" for other in range(1, world)])  # this rank holds the store
    else:
        store.set(f"host/{rank}", os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        store.set(f"done/{rank}", "")


def _merge(ranks: Sequence[Finding], hosts: dict[str, str]) -> Finding:
    """Return the worst finding of all ranks, which names its rank and host unless all are well."""
    number, worst = max(enumerate(ranks), key=lambda pair: (SEVERITY[pair[1].status], -pair[0]))
    if worst.status == "ok":
        return worst
    others = sum(one.status == worst.status for one in ranks) - 1
    more = f" (and {others} other ranks)" if others else ""
    return Finding(
        worst.name, worst.status, f"rank {number} on {hosts[str(number)]}: {worst.detail}{more}", worst.remedy
    )
