"""The machine: versions of libraries, GPUs and their driver, flash-attention, NCCL."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from medalign import __version__
from medalign.config import Config
from medalign.doctor.finding import Finding
from medalign.engine.settings import precision
from medalign.student.backends import allowed_attention, choose_attention
from medalign.student.families.registry import find_family
from medalign.student.files import read_object
from medalign.student.loading import model_folder

_SHOWN = ("torch", "deepspeed", "transformers", "peft", "triton")
_SECONDS = 10.0  # for nvidia-smi, which hangs if a driver is broken


def check_versions() -> Finding:
    """Compare the installed libraries with the ranges that the package requires."""
    try:
        required = [Requirement(text) for text in metadata.requires("medalign") or ()]
    except metadata.PackageNotFoundError:
        return Finding("versions", "warning", "medalign is not installed", "run tools/install.sh or pip install -e .")
    wrong = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found or 'is missing'} (needed: {requirement.specifier or 'any'})")
    if wrong:
        return Finding("versions", "error", ", ".join(wrong), "install again: bash -e tools/install.sh")
    shown = ", ".join(f"{name} {found}" for name in _SHOWN if (found := installed(name)))
    return Finding("versions", "ok", f"medalign {__version__}, Python {platform.python_version()}, {shown}")


def installed(name: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_gpu(gpus: int | None) -> Finding:
    """Check that torch sees the GPUs of this node.

    Args:
        gpus: how many the run expects on a node; None if it was not given.
    """
    driver = driver_version()
    if not torch.cuda.is_available():
        if driver is not None:
            return Finding(
                "gpu",
                "error",
                f"the NVIDIA driver {driver} is there, but torch {torch.__version__} sees no GPU",
                "install a torch for CUDA that this driver supports, or see CUDA_VISIBLE_DEVICES",
            )
        return Finding("gpu", "warning", "no GPU: the run would use the CPU", "run it again where the job will run")
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    detail = f"{count} x {name}, {memory:.0f} GiB, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    if torch.cuda.get_device_capability() < (8, 0):
        return Finding("gpu", "warning", f"{detail}: older than sm_80", "expect neither bf16 nor the fused kernels")
    if gpus is not None and count < gpus:
        return Finding("gpu", "error", f"{detail}; {gpus} are expected", "request them, or give another --gpus")
    return Finding("gpu", "ok", detail)


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None if nvidia-smi does not report one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def check_attention(config: Config) -> Finding:
    """Check the attention backend. Raises ConfigError for one that cannot run here or for this student."""
    folder = Path(model_folder(config.student))
    wanted = allowed_attention(config.student.attention, find_family(folder, read_object(folder / "config.json")))
    chosen = choose_attention(wanted, precision(config))
    if torch.cuda.is_available() and chosen == "sdpa" and wanted == "auto":
        return Finding(
            "attention",
            "warning",
            "sdpa, because flash-attn is not installed or the run is in fp32",
            "pip install flash-attn --no-build-isolation",
        )
    version = installed("flash-attn")
    return Finding("attention", "ok", f"{chosen}" + (f" {version}" if version and "flash" in chosen else ""))


def check_communication() -> Finding:
    """Check that the library that connects the ranks is part of torch."""
    if not torch.cuda.is_available():
        return Finding("communication", "ok", "gloo, on the CPU")
    if not torch.distributed.is_nccl_available():
        return Finding("communication", "error", "this torch has no NCCL", "install torch for CUDA on Linux")
    return Finding("communication", "ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
