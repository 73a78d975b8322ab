"""Prints the machine and the versions that the check runs on, as one JSON object."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from medalign.kernels import gpu

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "peft", "open_clip_torch", "flash_attn")


def main() -> None:
    """Print the object."""
    facts = {"python": platform.python_version(), "commit": _first_line("git", "rev-parse", "--short", "HEAD")}
    facts |= {name: _version(name) for name in PACKAGES}
    facts["triton can build"] = gpu.missing_to_build() or "yes"
    card: dict[str, object] = {"card": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        card = {
            "card": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
        }
    print(json.dumps(card | facts))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


if __name__ == "__main__":
    main()
