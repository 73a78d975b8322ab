"""Compilation of every binary that can be launched, for GPUs that need not be present."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medalign.benchmark.kernels.case import KernelCase
from medalign.errors import KernelError
from medalign.kernels.gpu import ARCHITECTURES


def compile_all(cases: Sequence[KernelCase], architectures: Sequence[str]) -> list[dict[str, Any]]:
    """Compile all binaries.

    Returns:
        One row per binary.

    Raises:
        KernelError: a binary does not compile, or triton is not installed.
    """
    try:
        from medalign.benchmark.kernels.triton_compiler import compile_ahead
    except ImportError as error:
        raise KernelError(f"kernels cannot be compiled: {error}; pip install triton") from error
    rows = []
    for architecture in architectures:
        for case in cases:
            for binary in case.binaries(architecture):
                found = compile_ahead(binary, architecture)
                rows.append(
                    {"architecture": architecture, "operation": case.name, "kernel": binary.name}
                    | found._asdict()
                    | {"complaint": _complaint(binary.tensor_cores, architecture, found)}
                )
    return rows


def _complaint(wants_tensor_cores: bool, architecture: str, found: Any) -> str:
    """The defects of a binary; empty if there are none."""
    card = ARCHITECTURES[architecture]
    complaints = []
    if wants_tensor_cores and not found.tensor_cores.startswith(card.tensor_core):
        complaints.append(f"no {card.tensor_core}")
    if found.spills or found.stack:
        complaints.append("registers spill")
    if found.shared_memory > card.shared_memory:
        complaints.append(f"more shared memory than {card.shared_memory}")
    return ", ".join(complaints)
