"""Ahead-of-time compilation of kernels for a GPU that need not be present, and inspection of the result."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medalign.benchmark.kernels.case import Binary
from medalign.errors import KernelError
from medalign.kernels.gpu import ARCHITECTURES, interpreting

FAILURES = (triton.TritonError, RuntimeError)  # what compiling and launching a kernel may raise
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """Figures of a compiled binary."""

    registers: int  # per thread
    stack: int  # bytes per thread, which hold spilled registers
    spills: int  # loads and stores of spilled registers in the machine code of one thread
    shared_memory: int  # bytes per program
    tensor_cores: str  # tensor-core instruction in the PTX, or ""


def compile_ahead(binary: Binary, architecture: str) -> Compiled:
    """Compile one binary. Raises KernelError if it does not compile, or if Triton interprets its kernels."""
    if interpreting():
        raise KernelError("interpreted kernels cannot be compiled; unset TRITON_INTERPRET and start again")
    if architecture not in ARCHITECTURES:
        raise KernelError(f"{architecture} is not a known architecture; choose one of {', '.join(ARCHITECTURES)}")
    names = binary.function.arg_names
    types = {name: "constexpr" if name in binary.constants else binary.types[name] for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in binary.divisible}
    source = ASTSource(binary.function, types, dict(binary.constants), divisible)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    try:
        kernel = triton.compile(source, target, {"num_warps": binary.warps, "num_stages": binary.stages})
    except FAILURES as error:
        raise KernelError(f"{binary.name} does not compile for {architecture}: {error}") from error
    return _inspect(kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata.shared)


def _inspect(cubin: bytes, ptx: str, shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _dump("--dump-resource-usage", file)
        code = _dump("--dump-sass", file)
    counted = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=counted["REG"],
        stack=counted["STACK"] + counted["LOCAL"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_memory=shared,
        tensor_cores=next((name for name in TENSOR_CORES if name in ptx), ""),
    )


def _dump(what: str, file: Path) -> str:
    environment = {"PATH": os.defpath + os.pathsep + str(_CUOBJDUMP.parent)}
    done = subprocess.run([_CUOBJDUMP, what, file], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise KernelError(f"{_CUOBJDUMP} {what}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
