"""What a run runs on, without a name of a host, a user or a folder."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medalign import __version__, distributed
from medalign.observability.files import write_text

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "open_clip_torch", "wandb", "numpy")


def describe_environment() -> dict[str, Any]:
    """Return the batch job, the number of ranks, the GPU of rank 0, and the versions of what determines a run."""
    gpu = torch.cuda.get_device_name(distributed.device()) if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "medalign": __version__, "cuda": torch.version.cuda}
    return {
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "world_size": distributed.world_size(),
        "gpu": gpu,
        "versions": versions | {name: version(name) for name in _PACKAGES},
    }


def write_environment(path: Path) -> dict[str, Any]:
    """Write the environment of this start, and return it."""
    environment = describe_environment()
    write_text(path, json.dumps(environment, indent=2) + "\n")
    return environment


def read_environment(path: Path) -> dict[str, Any]:
    """Return the environment of the last start; empty if the run has not written it."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
