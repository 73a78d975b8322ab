"""The types that describe an operation to the benchmark: its binaries, its cost, problems to measure, tuning entries.

Each operation has a folder here, and its `cases.py` defines a `KernelCase`. `registry` lists the cases. The rest of the
benchmark does not depend on the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Binary:
    """One kernel, as the operation launches it, to be compiled ahead of time."""

    name: str  # kernel and variant: unique within an architecture
    function: Any  # the triton.jit function
    types: Mapping[str, str]  # argument -> Triton's name of its type ("*bf16", "i32", ...), without the constants
    constants: Mapping[str, Any]  # constexpr argument -> value
    warps: int
    stages: int
    divisible: tuple[str, ...] = ()  # arguments (pointers, sizes) that are multiples of 16 in this variant
    tensor_cores: bool = True  # whether the code must contain tensor-core instructions


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes to and from memory, counted from shapes."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class CostModel:
    """The cost of one problem, value and gradient together, for each method.

    `costs` has the entries "least" (a lower bound for any method: inputs read once, results written once, the fewest
    operations known), "eager", and the implementations.
    """

    problem: str
    costs: Mapping[str, Cost]
    half: bool = True  # products at the speed of half precision, otherwise of TF32


@dataclass(frozen=True)
class Problem:
    """Inputs of one size, and the functions that compute the operation on them."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    paths: Mapping[str, Callable[[], torch.Tensor]]  # name -> the value, differentiable in `leaves`
    upstream: torch.Tensor  # gradient of the value, of its shape
    expected: Callable[[], tuple[torch.Tensor, ...]]  # value and gradients of the leaves, in float64
    tolerances: tuple[float, float]  # relative errors in norm of the value and of the gradients
    why: str  # the reason for the tolerances


@dataclass(frozen=True)
class TuningEntry:
    """One entry of a tile table, to be tuned on a GPU."""

    name: str
    problem: str  # description of the problem that `step` solves
    current: Mapping[str, Any]  # the tile in the table
    candidates: Sequence[Mapping[str, Any]]
    use: Callable[[Mapping[str, Any]], None]  # selects this candidate for the rest of the process
    step: Callable[[], object]  # the function to time
    table: Path  # the packaged table
    write: Callable[[Mapping[str, Any], str, Path], None]  # candidate, reason, file


@dataclass(frozen=True)
class KernelCase:
    """One operation with kernels."""

    name: str
    binaries: Callable[[str], Iterable[Binary]]  # architecture ("sm_90") -> every binary that can be launched
    cost_models: Callable[[], Iterable[CostModel]]
    # device, element type, token counts (None: the case's own for the device) -> problems, created one at a time
    problems: Callable[[torch.device, torch.dtype, Sequence[int] | None], Iterable[Problem]]
    tuning_entries: Callable[
        [torch.device], Iterable[TuningEntry]
    ]  # the table's entries for the architecture of the device
