"""The only module that imports DeepSpeed: sharded loading, the engine, gathering, saving."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    # DeepSpeed detects its accelerator when it is imported, but it does not detect that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from transformers.integrations import HfDeepSpeedConfig

from medalign import distributed
from medalign.engine import extensions
from medalign.engine.capture import captured_saves, defer_io_errors
from medalign.engine.host_memory import freed_at_once
from medalign.engine.universal import parts_of_this_rank
from medalign.errors import ConfigError, from_library
from medalign.run_folder import CheckpointFolder

# These warnings come from calls inside DeepSpeed and transformers, and they would hide the log of the run.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed|transformers")
for _name in ("DeepSpeed", "torch.distributed"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_TAG = CheckpointFolder.STATE


def require_valid(settings: Mapping[str, Any], name: str) -> None:
    """Check the keys and values of a DeepSpeed configuration.

    Args:
        settings: the complete configuration.
        name: its name or file, for the message.

    Raises:
        ConfigError: DeepSpeed would refuse it once the models are loaded, or would ignore a key.
    """
    ranks = settings["train_batch_size"] // (
        settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    )
    alone = _ReadKeys(copy.deepcopy(dict(settings)) | {"train_batch_size": settings["train_batch_size"] // ranks})
    try:
        DeepSpeedConfig(alone)  # there is no process group yet: it takes this rank for the only one
    except Exception as error:
        if not from_library(error, DeepSpeedConfigError):
            raise
        reason = " ".join(str(error).partition("\n    For further")[0].split())
        raise ConfigError(f"engine.deepspeed {name}: DeepSpeed refuses it ({reason}); correct the file") from error
    if unread := sorted(alone.keys() - alone.read):
        near = difflib.get_close_matches(unread[0], alone.read, n=1)
        remedy = f"write {near[0]!r}" if near else "remove it"
        raise ConfigError(f"engine.deepspeed {name}: DeepSpeed does not know {unread[0]!r}, and ignores it; {remedy}")


class _ReadKeys(dict[str, Any]):
    """The top level of a DeepSpeed configuration. `read`: the keys that DeepSpeed has looked for.

    DeepSpeed refuses unknown keys within its sections, but not beside them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)  # asks __contains__, as the keys of a plain dict do not


def start(settings: Mapping[str, Any]) -> None:
    """Initialize the process group: nccl on GPUs, gloo on CPUs. Every rank must call it.

    The environment variables of the launcher must be set.

    Raises:
        ConfigError: the port at which rank 0 listens is in use, or there are more ranks than GPUs.
    """
    if torch.cuda.is_available():
        visible, number = torch.cuda.device_count(), distributed.local_rank()
        if number >= visible:
            raise ConfigError(
                f"rank {distributed.rank()} is number {number} of its node, counted from 0, but it sees {visible} GPUs "
                "(CUDA_VISIBLE_DEVICES): start one rank per GPU, each of which sees all GPUs of its node"
            )
        torch.cuda.set_device(number)
    # DeepSpeed would compile its shared-memory extension here. The first start on a machine would take minutes, under
    # a lock that all processes of a user share. Only tensor-parallel inference uses the extension, and DeepSpeed does
    # not compile it if no operation is listed as compatible.
    deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=distributed.TIMEOUT, verbose=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of this machine is in use, probably by another run (the deepspeed "
            "launcher always takes 29500): give each run another one, with --master_port N before --module, or with "
            "the variable MASTER_PORT for srun"
        ) from error


def stop() -> None:
    """Destroy the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def sharded_loading(settings: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers partition weights over the ranks while it reads them, if the settings use ZeRO-3."""
    if stage(settings) != 3:
        yield
        return
    keep_alive = HfDeepSpeedConfig(dict(settings))
    try:
        with freed_at_once():
            yield
    finally:
        del keep_alive


class Engine:
    """A student whose state is partitioned over the ranks. Every rank must create it and call its methods.

    Args:
        student: the whole module, with everything that learns already attached.
        groups: parameter groups as torch's AdamW takes them, with "lr", "weight_decay", "betas" and "eps"; "name"
            entries are kept.
        settings: a complete DeepSpeed configuration.
    """

    def __init__(self, student: nn.Module, groups: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> None:
        with distributed.raise_on_all_ranks():
            extensions.prepare(settings)
        optimizer = torch.optim.AdamW(list(groups))
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=dict(settings), dist_init_required=False
        )
        self._names = [str(group["name"]) for group in groups]
        self.accumulation = int(settings["gradient_accumulation_steps"])
        self.device: torch.device = torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student's forward pass. Every rank must call it."""
        return self._engine(*args, **kwargs)

    @property
    def student(self) -> nn.Module:
        """The student, as DeepSpeed wraps its weights."""
        module: nn.Module = self._engine.module
        return module

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch.

        The gradient of a step is that of the mean of `loss` over ranks and micro-batches.
        """
        self._engine.backward(loss)

    def step(self, rates: Mapping[str, float]) -> float:
        """Count one micro-batch, and update the parameters after the last micro-batch of a step.

        Args:
            rates: learning rate of each parameter group by its name.

        Returns:
            The norm of the gradient before clipping, of the last update.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each parameter group by name, as set in the optimizer."""
        return {name: float(group["lr"]) for name, group in zip(self._names, self.optimizer.param_groups, strict=True)}

    def gather_parameters(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
        """Gather partitioned parameters. Every rank must call it.

        Args:
            parameters: names and parameters.

        Returns:
            The complete parameters by name, on the CPU, on rank 0; an empty dict on the other ranks.
        """
        gathered = {}
        for name, parameter in parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                if distributed.is_main():
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """Return the Euclidean norm of parameters together. Every rank must call it."""
        squares = 0.0
        for parameter in parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                squares += float(parameter.detach().float().square().sum())
        return math.sqrt(squares)

    def capture(self, folder: Path, *, copy: bool) -> list[Callable[[], Path]]:
        """Prepare this rank's files of a checkpoint: trainable parameters and optimizer. Every rank must call it.

        DeepSpeed's folders and scripts are written at once. A rank that cannot write them still passes DeepSpeed's
        barriers with the other ranks and raises at the end.

        Args:
            folder: where the files belong.
            copy: whether to copy the state into host memory now (12 bytes per trainable parameter, divided by the
                number of ranks), so that the files may be written during later steps.

        Returns:
            Functions that each write one file and return its path. They do not communicate. Without `copy` they must
            be called before the next step.

        Raises:
            OSError, RuntimeError: this rank cannot write.
        """
        writer = self._engine.checkpoint_engine
        at_once = ((writer, "makedirs"), (self._engine, "_copy_recovery_script"))
        with defer_io_errors(*at_once), captured_saves(writer, copy=copy) as files:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        return files

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """Load a checkpoint. Every rank must call it.

        Args:
            folder: written by `capture` on the same number of ranks or, with `universal`, by `to_universal`.
            universal: whether the checkpoint is in DeepSpeed's universal format.
        """
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        # DeepSpeed reads this from its settings, but the format is known only after the engine was created.
        self._engine._config.load_universal_checkpoint = universal
        with parts_of_this_rank(self.optimizer) if universal else contextlib.nullcontext():
            self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        self._restore_groups(own)

    def _restore_groups(self, own: Sequence[Mapping[str, Any]]) -> None:
        """Restore the entries of each parameter group and the number of updates in each optimizer state.

        DeepSpeed loads a universal checkpoint of ZeRO-3 with the entries of the first group (name, learning rate,
        weight decay) in all groups, and with a single tensor `step` shared by all states, which Adam then increments
        once per state. A checkpoint that was saved after such a load contains these wrong entries and counts.
        """
        updates = self._engine.global_steps - self._engine.skipped_steps
        for group, entries in zip(self.optimizer.param_groups, own, strict=True):
            group.update(entries)
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], updates)


def stage(settings: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
