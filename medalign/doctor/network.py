"""The network: W&B's service, and the ports between the ranks of a job."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from medalign import distributed
from medalign.config import Config
from medalign.doctor.finding import Finding

_SECONDS = 5.0
MEETING = timedelta(seconds=300)  # how long ranks wait for each other


def check_wandb(config: Config, seconds: float = _SECONDS) -> Finding:
    """Connect to the service if the run would send metrics there. Nothing is sent."""
    if config.log.wandb != "online":
        return Finding("wandb", "ok", f"not needed, because log.wandb is {config.log.wandb}")
    address = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return Finding(
            "wandb",
            "warning",
            f"{host}:{port} cannot be reached: {error.strerror or error}",
            "set log.wandb to offline, and send the run later with medalign wandb sync",
        )
    return Finding("wandb", "ok", f"{host}:{port} can be reached")


def meet(timeout: timedelta = MEETING) -> dist.TCPStore:
    """Return the store of rank 0, where ranks exchange findings. Every rank must call it.

    The variables of the launcher must be set.

    Raises:
        RuntimeError: a rank does not reach rank 0 in time; a subclass of torch's.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, distributed.world_size(), distributed.is_main(), timeout)


def check_ports(store: dist.TCPStore, seconds: float = _SECONDS) -> Finding:
    """Connect each rank to the next one on a free port, as NCCL and gloo do. Every rank must call it."""
    rank, world = distributed.rank(), distributed.world_size()
    with socket.create_server(("", 0)) as listener:
        store.set(f"listener/{rank}", f"{socket.gethostname()} {listener.getsockname()[1]}")
        host, port = store.get(f"listener/{(rank + 1) % world}").decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=seconds).close()
            found = Finding("ports", "ok", f"{world} ranks, each reaches the next one")
        except OSError as error:
            found = Finding(
                "ports",
                "error",
                f"{socket.gethostname()} cannot reach {host}:{port}: {error.strerror or error}",
                "open the ports between the nodes, or choose an interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
            )
        store.set(f"connected/{rank}", "")
        store.wait([f"connected/{other}" for other in range(world)])  # the listener stays open until then
    return found
