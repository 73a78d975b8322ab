"""The GPUs that the fused kernels support, and whether a device can run them. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch


class Architecture(NamedTuple):
    """The data sheet of one GPU of an architecture: dense operations per second and bytes per second."""

    card: str
    multiprocessors: int
    shared_memory: int  # bytes available to one program
    half_operations: float  # bfloat16 and float16 products with float32 accumulation
    tf32_operations: float
    bandwidth: float
    tensor_core: str  # PTX instruction of its matrix products


ARCHITECTURES = {
    "sm_80": Architecture("A100 SXM 80 GB", 108, 163 * 1024, 312e12, 156e12, 2.04e12, "mma.sync"),
    "sm_90": Architecture("H100 SXM", 132, 227 * 1024, 989e12, 495e12, 3.35e12, "wgmma"),
    "sm_100": Architecture("B200", 148, 227 * 1024, 2250e12, 1125e12, 8.0e12, "tcgen05"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED_AS = "sm_90"  # the interpreter uses the tiles of this architecture


def refusal(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on `device` with tensors of `dtypes`, and the remedy; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install triton, or choose impl="chunked"'
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f'{dtype} is not float32, bfloat16 or float16; convert the input, or choose impl="chunked"'
    if interpreting():
        return None
    if device.type != "cuda":
        return (
            f"the tensors are on {device} and the kernels need CUDA; move them to a GPU, choose "
            'impl="chunked", or set TRITON_INTERPRET=1 before starting Python to interpret them (slow, for tests)'
        )
    if torch.version.hip:
        return 'the kernels support NVIDIA GPUs only; choose impl="chunked"'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than sm_80; choose impl="chunked"'
    missing = missing_to_build()
    return f'Triton compiles a C file at its first launch, and {missing}, or choose impl="chunked"' if missing else None


@functools.cache
def missing_to_build() -> str | None:
    """What is missing to compile the C file with which Triton loads its kernels, and the remedy; None if nothing is.

    Triton needs a C compiler (`CC`, gcc or clang) and Python's headers. A machine that has only the driver may have
    neither.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler was found; install one (apt install gcc)"
    scheme = sysconfig.get_default_scheme()
    # Debian's default scheme names a folder without the headers; Triton makes the same exception.
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(folder) / "Python.h").is_file():
        return f"Python's headers are not in {folder}; install them (apt install python3-dev)"
    return None


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU. It reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def architecture(device: torch.device) -> str:
    """The key into `ARCHITECTURES` and every tile table for a device that can run the kernels.

    A generation without an entry uses that of the nearest older one.
    """
    if device.type != "cuda":
        return INTERPRETED_AS
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes available to one program on `device`."""
    if device.type != "cuda":
        return ARCHITECTURES[INTERPRETED_AS].shared_memory
    # CUDA reserves 1 KB per program on each multiprocessor.
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024
