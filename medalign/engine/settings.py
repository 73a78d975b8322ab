"""One DeepSpeed configuration from a JSON of `ds_configs/` and the run's settings. Disagreement is an error."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from medalign.config import Config
from medalign.data.order.order import StepPlan
from medalign.errors import ConfigError

# Gradients of bf16 weights are summed in fp32, over micro-batches and over ranks; DeepSpeed's default is the weights'
# dtype, which keeps 8 bits of a sum. A JSON may choose otherwise.
_SUMS = ("data_types.grad_accum_dtype", "communication_data_type")


def precision(config: Config) -> torch.dtype:
    """The dtype of weights and activations: bf16 on a GPU unless the run says otherwise."""
    chosen = config.train.precision
    if chosen == "auto":
        chosen = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration. Raises ConfigError if the JSON contradicts the run's settings."""
    settings = _read(config.engine.deepspeed)
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    ours: dict[str, Any] = {
        # Where ranks and micro-batches do not divide the batch, this is what DeepSpeed counts; the losses are
        # divided by what is really there.
        "train_batch_size": plan.accumulation * config.train.micro_batch_size * world,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": precision(config) is torch.bfloat16,
        "steps_per_print": 2**31,
        # AdamW of torch runs on every device and needs no compiler on the node.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in ours.items():
        _agree(settings, key, value, config.engine.deepspeed)
    for key in _SUMS:
        inner, last = _place(settings, key)
        inner[last] = "fp32" if inner.get(last, "auto") == "auto" else inner[last]
    for key in ("optimizer", "scheduler", "fp16", "amp"):
        if key in settings:
            raise ConfigError(f"{config.engine.deepspeed}: remove {key!r}; the run's own settings decide it")
    return settings


def _place(settings: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The object that holds a dotted key, made where it is absent, and the key's last part."""
    *path, last = dotted.split(".")
    for part in path:
        settings = settings.setdefault(part, {})
    return settings, last


def _agree(settings: dict[str, Any], dotted: str, value: Any, name: str) -> None:
    settings, last = _place(settings, dotted)
    found = settings.get(last, "auto")
    if found not in ("auto", value):
        raise ConfigError(
            f"{name} says {dotted} = {found!r}, the run's settings say {value!r}; remove it from the JSON"
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
        raise ConfigError(f"engine.deepspeed: there is no file {name}")
    package = Path(str(resources.files("medalign")))
    # Beside the package in a checkout, inside it once installed.
    folders = [package.parent / "ds_configs", package / "ds_configs"]
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.json")})
    raise ConfigError(
        f"engine.deepspeed {name!r} is not known; packaged are {', '.join(known)}; or give a path to a JSON"
    )
