"""What a kernel's folder tells the benchmark about it: its binaries, its cost, problems to measure it on.

Each folder with kernels has a `cases.py` with a list `CASES` of `KernelCase`; `medalign.benchmark` reads the lists
and knows nothing else of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Binary:
    """One kernel as dispatch launches it, to be compiled ahead of time."""

    name: str  # kernel and variant: unique within an architecture
    function: Any  # the triton.jit function
    types: Mapping[str, str]  # argument -> Triton's name of its type ("*bf16", "i32", ...), the constants left out
    constants: Mapping[str, Any]  # constexpr argument -> value
    warps: int
    stages: int
    divisible: tuple[str, ...] = ()  # arguments (pointers, sizes) that are multiples of 16 in this variant
    tensor_cores: bool = True  # whether the code must hold tensor-core instructions


@dataclass(frozen=True)
class Cost:
    """Operations (an addition and a multiplication are two) and bytes to and from memory, counted from shapes."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class CostModel:
    """The cost of one problem, value and gradient together, for each way to solve it.

    `costs` has "least" (what any method must do: its inputs read once, its results written once, the fewest
    operations known), "eager", and the implementations.
    """

    problem: str
    costs: Mapping[str, Cost]
    half: bool = True  # products at half precision's speed, else at TF32's


@dataclass(frozen=True)
class Problem:
    """Inputs of one size, and the paths that solve it."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    paths: Mapping[str, Callable[[], torch.Tensor]]  # name -> the value, differentiable in `leaves`
    upstream: torch.Tensor  # gradient of the value, of its shape
    expected: Callable[[], tuple[torch.Tensor, ...]]  # value and gradients of the leaves, in float64
    tolerances: tuple[float, float]  # of value and of gradients, relative, in norm
    why: str  # the reason for them


@dataclass(frozen=True)
class TuningEntry:
    """One entry of a table of configurations, to be tuned on a GPU."""

    name: str
    problem: str  # what `step` solves, in words
    current: Mapping[str, Any]  # what the table holds
    candidates: Sequence[Mapping[str, Any]]
    use: Callable[[Mapping[str, Any]], None]  # take this candidate from now on, in this process
    step: Callable[[], object]  # what is timed
    table: Path  # the packaged one
    write: Callable[[Mapping[str, Any], str, Path], None]  # into a table on disk, with the reason


@dataclass(frozen=True)
class KernelCase:
    """One operation with kernels."""

    name: str
    binaries: Callable[[str], Iterable[Binary]]  # architecture ("sm_90") -> every configuration dispatch can choose
    cost_models: Callable[[], Iterable[CostModel]]
    # device, element type, token counts (None: the case's own for the device) -> problems, made when their turn comes
    problems: Callable[[torch.device, torch.dtype, Sequence[int] | None], Iterable[Problem]]
    tuning_entries: Callable[[torch.device], Iterable[TuningEntry]]  # the entries for the architecture of the device
