"""Rank, world, seed, reductions, and a logger that speaks on rank 0 alone."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from medalign import errors
from medalign.errors import ConfigError, MedAlignError

log = logging.getLogger("medalign")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def adopt_launcher() -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK and the master's address where the launcher did not.

    The deepspeed launcher and torchrun set them. `srun` sets SLURM's own names, which are translated. A bare
    start is one rank on a free local port. Raises ConfigError in a batch script of several tasks without `srun`.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_NODELIST" not in os.environ:
            raise ConfigError(
                f"this SLURM job has {os.environ['SLURM_NTASKS']} tasks, but srun did not start this one "
                "(SLURM_STEP_NODELIST is not set): start it with srun --kill-on-bad-exit=1 python -m medalign train ..."
            )
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        # Every task of a job must come to the same port, and two jobs on a node to different ones.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list, such as `gpu` followed by `[03-07,12],login1` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise ValueError(f"not a SLURM node list: {nodelist!r}")
    return match.group(1) + (match.group(2) or "")


def set_up_logging() -> None:
    """Information from rank 0, warnings from every rank (with its number)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if is_main() else f"[rank {rank()}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False


def seed_step(seed: int, step: int) -> None:
    """Make every random draw of a step a function of (seed, step, rank), so that no generator's state is saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank())


def sum_over_ranks(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars summed over all ranks, in one reduction. Every rank passes the same names."""
    names = sorted(values)
    stacked = torch.stack([values[name].detach().double() for name in names])
    if _several():
        dist.all_reduce(stacked)
    return {name: stacked[i].float() for i, name in enumerate(names)}


def barrier() -> None:
    if _several():
        dist.barrier()


def broadcast_from_main(text: str) -> str:
    """Rank 0's text on every rank, so that all take the same branch."""
    return _said_by(0, text) if _several() else text


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What one rank raises inside (a MedAlignError, or an OSError), all raise at the end. Every rank must enter.

    A rank that raises must not leave another one waiting for it inside.
    """
    fault: MedAlignError | None = None
    try:
        yield
    except MedAlignError as error:
        fault = error
    except OSError as error:
        fault = MedAlignError(errors.plain(error))
        fault.__cause__ = error
    raise_on_any_fault(fault)


def raise_on_any_fault(fault: MedAlignError | None) -> None:
    """Raise the fault of the first rank that has one, on every rank. Every rank must call it."""
    if not _several():
        if fault is not None:
            raise fault
        return
    speaker = torch.tensor([dist.get_world_size() if fault is None else dist.get_rank()], device=device())
    dist.all_reduce(speaker, dist.ReduceOp.MIN)
    first = int(speaker.item())
    if first == dist.get_world_size():
        return
    kind, _, text = _said_by(first, f"{type(fault).__name__}:{fault}").partition(":")
    raise getattr(errors, kind, MedAlignError)(text if first == 0 else f"rank {first}: {text}") from fault


def _said_by(speaker: int, text: str) -> str:
    """The text of one rank, on every rank."""
    words = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    length = torch.tensor([len(words)], device=device())
    dist.broadcast(length, speaker)
    if dist.get_rank() != speaker:
        words = torch.empty(int(length.item()), dtype=torch.uint8, device=device())
    if len(words):
        dist.broadcast(words, speaker)
    return bytes(words.tolist()).decode()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


TIMEOUT = timedelta(minutes=30)  # a rank that waits longer than this for another one gives up


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
