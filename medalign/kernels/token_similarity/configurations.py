"""Which tiles the kernels take: fixed, for each architecture, in `configurations.json`, with the reason.

The table is made offline, by hand or by `medalign bench kernels --tune`; nothing is tried out at run time.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from medalign.kernels.gpu import ARCHITECTURES

TABLE = Path(__file__).with_name("configurations.json")
GRAIN = 128  # every tile's sides divide it: tokens are padded to a multiple
FEW = "half, few tiles"
WAVES = 2  # with fewer tiles than this a multiprocessor, smaller ones spread the work better


class Tile(NamedTuple):
    """Rows and columns of a result's tile, the depth of one step, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_memory(self, element_size: int) -> int:
        """Bytes of one program: the operands of every stage, or the result on its way to memory."""
        operands = self.stages * (self.rows + self.columns) * self.depth * element_size
        return max(operands, self.rows * self.columns * 4) + 2048  # barriers, sums across warps


@functools.cache
def table() -> dict[str, dict[str, dict[str, Tile]]]:
    """Architecture -> kernel -> kind -> tile."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        architecture: {
            kernel: {kind: Tile(*(entry[name] for name in Tile._fields)) for kind, entry in kinds.items()}
            for kernel, kinds in kernels.items()
        }
        for architecture, kernels in stored.items()
    }


def kinds(kernel: str, *dtypes: torch.dtype) -> tuple[str, ...]:
    """The kinds of tile that `kernel` may take for features of these types."""
    if torch.float32 in dtypes:
        return ("single",)
    return ("half", FEW) if kernel == "differences" else ("half",)


def differences(
    architecture: str, student: torch.dtype, teacher: torch.dtype, tokens: int, samples: int
) -> Tile:
    tiles = table()[architecture]["differences"]
    if torch.float32 in (student, teacher):
        return tiles["single"]
    side = -(-tokens // tiles["half"].rows)
    enough = WAVES * ARCHITECTURES[architecture].multiprocessors
    return tiles["half" if samples * side * (side + 1) / 2 >= enough else FEW]


def gradients(architecture: str, student: torch.dtype) -> Tile:
    (kind,) = kinds("gradients", student)
    return table()[architecture]["gradients"][kind]


def shared_memory(architecture: str, student: torch.dtype, teacher: torch.dtype) -> int:
    """Bytes that the hungriest kernel asks for."""
    tiles = table()[architecture]
    size = max(student.itemsize, teacher.itemsize)
    pairs = [tiles["differences"][kind].shared_memory(size) for kind in kinds("differences", student, teacher)]
    return max(*pairs, gradients(architecture, student).shared_memory(student.itemsize))
