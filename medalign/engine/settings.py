"""Combines a JSON file from `ds_configs/` and the run's settings into one DeepSpeed configuration."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from medalign.config import Config
from medalign.data.order.order import StepPlan
from medalign.errors import ConfigError

# Gradients of bf16 weights are summed in fp32 over micro-batches and ranks. DeepSpeed's default is the data type of the
# weights, which has a precision of only 8 bits. The JSON file may set another type.
_SUM_DTYPES = ("data_types.grad_accum_dtype", "communication_data_type")


def precision(config: Config) -> torch.dtype:
    """Return the data type of weights and activations. The default is bf16 on a GPU and fp32 on a CPU."""
    chosen = config.train.precision
    if chosen == "auto":
        chosen = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Args:
        config: the run's settings.
        world: number of ranks.

    Raises:
        ConfigError: the JSON file cannot be read or contradicts the run's settings.
    """
    settings = _read(config.engine.deepspeed)
    if _stage(settings, config.engine.deepspeed) == 3 and config.student.quantization != "none":
        raise ConfigError(
            f"student.quantization is {config.student.quantization}, but engine.deepspeed {config.engine.deepspeed} is "
            "ZeRO stage 3, which cannot partition weights of 4 bits; set engine.deepspeed to zero2"
        )
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    ours: dict[str, Any] = {
        # DeepSpeed counts full micro-batches even if ranks and micro-batches do not divide the batch. The losses are
        # divided by the actual counts.
        "train_batch_size": plan.accumulation * config.train.micro_batch_size * world,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": precision(config) is torch.bfloat16,
        "bf16.check_grad_overflow": True,  # an update with a gradient that is not finite would destroy the weights
        "steps_per_print": 2**31,
        # torch's AdamW runs on every device and needs no compiler on the node.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in ours.items():
        _set(settings, key, value, config.engine.deepspeed)
    for key in _SUM_DTYPES:
        inner, last = _parent(settings, key, config.engine.deepspeed)
        inner[last] = "fp32" if inner.get(last, "auto") == "auto" else inner[last]
    for key in ("optimizer", "scheduler", "fp16", "amp"):
        if key in settings:
            raise ConfigError(f"{config.engine.deepspeed}: remove {key!r}; the run's settings determine it")
    return settings


def _stage(settings: dict[str, Any], name: str) -> int:
    """Return the ZeRO stage of a JSON file. Without ZeRO, DeepSpeed would update with gradients that are not finite."""
    inner, last = _parent(settings, "zero_optimization.stage", name)
    stage = inner.get(last, 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(f"{name} has zero_optimization.stage {stage!r}; set it to 1, 2 or 3")
    return stage


def _parent(settings: dict[str, Any], dotted: str, name: str) -> tuple[dict[str, Any], str]:
    """Return the object that contains a dotted key, which is created if necessary, and the last part of the key."""
    *path, last = dotted.split(".")
    for part in path:
        settings = settings.setdefault(part, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{name}: {part} is {settings!r}, but it must be an object; write {part}: {{...}}")
    return settings, last


def _set(settings: dict[str, Any], dotted: str, value: Any, name: str) -> None:
    """Set a dotted key. Raises ConfigError if it has another value already."""
    settings, last = _parent(settings, dotted, name)
    found = settings.get(last, "auto")
    if found not in ("auto", value):
        raise ConfigError(
            f"{name} sets {dotted} to {found!r}, but the run's settings set it to {value!r}; remove it there"
        )
    settings[last] = value


def _read(name: str) -> dict[str, Any]:
    path = _path(name)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return settings


def _path(name: str) -> Path:
    if name.endswith(".json"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"engine.deepspeed: the file {name} does not exist")
    package = Path(str(resources.files("medalign")))
    # The folder is next to the package in a checkout and inside the package once it is installed.
    folders = [package.parent / "ds_configs", package / "ds_configs"]
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.json")})
    raise ConfigError(f"engine.deepspeed {name!r} is not known; use {', '.join(known)} or the path of a JSON file")
