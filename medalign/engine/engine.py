"""The only door to DeepSpeed: sharded loading, the engine, gathering, saving."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    # DeepSpeed looks once, when it is imported; without a GPU it has to be told.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from transformers.integrations import HfDeepSpeedConfig

from medalign import distributed
from medalign.distributed import log
from medalign.run_folder import CheckpointFolder

# Calls inside DeepSpeed and transformers that nobody here can change; they would bury a run's own lines.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed|transformers")

_TAG = CheckpointFolder.STATE


def start(settings: Mapping[str, Any]) -> None:
    """Open the process group (nccl on GPUs, gloo on CPUs). The launcher's variables must be set."""
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.local_rank())
    # DeepSpeed would compile its shared-memory extension here, minutes at the first start of a machine, under a lock of
    # torch's that all processes of a user share. Only tensor-parallel inference uses it; none is listed, none is built.
    deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=distributed.TIMEOUT, verbose=False)


def stop() -> None:
    """Close the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def sharded_loading(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers partitions weights over the ranks while it reads them (ZeRO-3 alone)."""
    keep_alive = HfDeepSpeedConfig(dict(settings)) if stage(settings) == 3 else None
    try:
        yield
    finally:
        del keep_alive


class Engine:
    """A student whose state is spread over the ranks.

    Args:
        student: the whole module, with everything that learns already attached.
        groups: parameter groups as torch's AdamW takes them, with "lr", "weight_decay", "betas" and "eps"; "name"
            entries are kept.
        settings: a complete DeepSpeed configuration.
    """

    def __init__(self, student: nn.Module, groups: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> None:
        _announce_compilation(settings)
        optimizer = torch.optim.AdamW(list(groups))
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=dict(settings), dist_init_required=False
        )
        self._names = [str(group["name"]) for group in groups]
        self.accumulation = int(settings["gradient_accumulation_steps"])
        self.device: torch.device = torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @property
    def student(self) -> nn.Module:
        return self._engine.module

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradient. The step's gradient is the mean of `loss` over ranks and micro-batches."""
        self._engine.backward(loss)

    def step(self, rates: Mapping[str, float]) -> float:
        """Count one micro-batch; after the last of a step, update with these learning rates by group name.

        Returns the norm of the gradient before clipping (of the last update).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter group by name, as the optimizer itself has it."""
        return {name: float(group["lr"]) for name, group in zip(self._names, self.optimizer.param_groups, strict=True)}

    def gather_parameters(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
        """Whole parameters by name, on the CPU, on rank 0; an empty dict on the others. Every rank must call it."""
        whole = {}
        for name, parameter in parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                if distributed.is_main():
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def save(self, folder: Path) -> None:
        """Write what learns, with the optimizer's state, into `folder`. Every rank must call it.

        A rank whose disk fails goes through DeepSpeed's barriers with the others and raises at the end.
        """
        writer = self._engine.checkpoint_engine
        with defer_io_errors((writer, "makedirs"), (writer, "save"), (self._engine, "_copy_recovery_script")):
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """Read what `save` wrote on the same number of ranks, or, universal, what `to_universal` made of it."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        # DeepSpeed wants this in its settings, before the engine is there; which of the two it will be is known later.
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        self._separate(own)

    def _separate(self, own: Sequence[Mapping[str, Any]]) -> None:
        """Give each parameter group its own entries and each optimizer state its own count of updates.

        DeepSpeed loads a universal checkpoint of ZeRO-3 with the entries of the first group (name, learning rate,
        weight decay) in all groups, and with one tensor `step` in all states, which Adam then advances once per state.
        A checkpoint that was saved after such a load holds these entries and counts.
        """
        updates = self._engine.global_steps - self._engine.skipped_steps
        for group, entries in zip(self.optimizer.param_groups, own, strict=True):
            group.update(entries)
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], updates)


def to_universal(source: Path, target: Path) -> None:
    """Rewrite what `Engine.save` wrote into `source` as DeepSpeed's universal form, which any number of ranks reads.

    One process does it, tensor by tensor, on the CPU; `target` must not exist.
    """
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(source / _TAG),
        output_folder=str(target / _TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)


def stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _announce_compilation(settings: Mapping[str, Any]) -> None:
    """Tell why a start can be silent for minutes. No packaged configuration makes DeepSpeed compile anything."""
    zero = settings.get("zero_optimization", {})
    offloaded = [zero.get(key) or {} for key in ("offload_param", "offload_optimizer")]
    nvme = any(part.get("device") == "nvme" for part in offloaded)
    if nvme or any(value for key, value in zero.items() if key.startswith("zero_quantized")):
        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
        log.warning(
            "engine.deepspeed asks for %s: DeepSpeed compiles an extension for it in %s, which takes minutes at the "
            "first start. It waits there for another process that holds the extension's lock; if the run goes no "
            "further, start it again with TORCH_EXTENSIONS_DIR set to a folder of its own",
            "offload to NVMe" if nvme else "quantized communication",
            folder,
        )


@contextlib.contextmanager
def defer_io_errors(*methods: tuple[Any, str]) -> Iterator[None]:
    """Inside, these methods of these objects keep what a writer raises; the first of it is raised at the end."""
    failures: list[Exception] = []

    def late(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return call

    with contextlib.ExitStack() as undo:
        for owner, name in methods:
            setattr(owner, name, late(getattr(owner, name)))
            undo.callback(delattr, owner, name)
        yield
    if failures:
        raise failures[0]
