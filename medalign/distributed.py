"""Rank, world size, seed, reductions, and a logger that writes on rank 0 only."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from medalign import errors
from medalign.errors import ConfigError, MedAlignError

log = logging.getLogger("medalign")


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """Return the GPU of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def adopt_launcher() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and the master address if the launcher did not.

    The deepspeed launcher and torchrun set them. `srun` sets SLURM's variables, which are translated. Without a
    launcher there is one rank on a free local port.

    Raises:
        ConfigError: a batch script with several tasks was started without `srun`.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_NODELIST" not in os.environ:
            raise ConfigError(
                f"this SLURM job has {os.environ['SLURM_NTASKS']} tasks, but srun did not start this one "
                "(SLURM_STEP_NODELIST is not set): start it with srun --kill-on-bad-exit=1 python -m medalign ..."
            )
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        # All tasks of a step must choose the same port, and two jobs on a node, or two steps of a job, different ones.
        number = int(os.environ["SLURM_JOB_ID"]) + 1009 * int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20000 + number % 12000))
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `gpu[03-07,12],login1` -> `gpu03`.

    Raises:
        ValueError: the text is not a node list.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise ValueError(f"not a SLURM node list: {nodelist!r}")
    return match.group(1) + (match.group(2) or "")


def set_up_logging() -> None:
    """Log information from rank 0, and warnings from every rank with its number."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if is_main() else f"[rank {rank()}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False


class _RankLog(logging.FileHandler):
    """A file of messages. It is left out while the disk is full: the terminal has them too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is the library's)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the messages of this rank to a file too inside the context, with the time. Earlier messages are kept.

    An exception that ends the context is written too, with its traceback unless it is one that the user can correct.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _RankLog(path, encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written (%s): messages go to the terminal only", path, error.strerror or error)
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        trace = None if isinstance(error, MedAlignError) else (type(error), error, error.__traceback__)
        handler.handle(logging.LogRecord(log.name, logging.ERROR, __file__, 0, "%r", (error,), trace))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def seed_step(seed: int, step: int) -> None:
    """Seed every random draw of a step with (seed, step, rank), so that no generator state needs to be saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank())


def sum_over_ranks(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum scalars over all ranks in one reduction. Every rank must call it with the same names."""
    names = sorted(values)
    stacked = torch.stack([values[name].detach().double() for name in names])
    if _several():
        dist.all_reduce(stacked)
    return {name: stacked[i].float() for i, name in enumerate(names)}


def barrier() -> None:
    """Wait for all ranks. Every rank must call it."""
    if _several():
        dist.barrier()


def broadcast_from_main(text: str) -> str:
    """Return the text of rank 0 on every rank, so that all take the same branch. Every rank must call it."""
    return _broadcast_text(0, text) if _several() else text


def gather_texts(text: str) -> list[str]:
    """Return the text of each rank, in the order of the ranks, on every rank. Every rank must call it."""
    if not _several():
        return [text]
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    lengths = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(encoded)], device=device()))
    sizes = torch.cat(lengths).tolist()
    padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8, device=device())
    padded[: len(encoded)] = encoded
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(texts, sizes, strict=True)]


def any_rank(flag: bool) -> bool:
    """Return whether the flag of any rank is set. Every rank must call it."""
    if not _several():
        return flag
    found = torch.tensor([float(flag)], device=device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Re-raise a MedAlignError or an OSError of one rank on all ranks at the end of the block. Every rank must enter.

    The block must not contain a collective operation, because the other ranks would wait in it for a rank that raised.
    """
    fault: MedAlignError | None = None
    try:
        yield
    except MedAlignError as error:
        fault = error
    except OSError as error:
        fault = MedAlignError(errors.format_os_error(error))
        fault.__cause__ = error
    raise_on_any_fault(fault)


def raise_on_any_fault(fault: MedAlignError | None) -> None:
    """Raise the fault of the first rank that has one on every rank. Every rank must call it."""
    if not _several():
        if fault is not None:
            raise fault
        return
    source = torch.tensor([dist.get_world_size() if fault is None else dist.get_rank()], device=device())
    dist.all_reduce(source, dist.ReduceOp.MIN)
    first = int(source.item())
    if first == dist.get_world_size():
        return
    kind, _, text = _broadcast_text(first, f"{type(fault).__name__}:{fault}").partition(":")
    raise getattr(errors, kind, MedAlignError)(text if first == 0 else f"rank {first}: {text}") from fault


def _broadcast_text(source: int, text: str) -> str:
    """Broadcast the text of one rank to every rank."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    length = torch.tensor([len(encoded)], device=device())
    dist.broadcast(length, source)
    if dist.get_rank() != source:
        encoded = torch.empty(int(length.item()), dtype=torch.uint8, device=device())
    if len(encoded):
        dist.broadcast(encoded, source)
    return bytes(encoded.tolist()).decode()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


TIMEOUT = timedelta(minutes=30)  # a rank that waits longer than this for another rank fails


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
