"""The tile sizes of the kernels: fixed for each architecture in `tile_table.json`, with the reason for each.

The table is written offline, by hand or by `medalign bench kernels --tune`; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from medalign.kernels.gpu import ARCHITECTURES

TABLE = Path(__file__).with_name("tile_table.json")
GRAIN = 128  # tokens are padded to a multiple; the sides of every tile divide it
HALF, FEW, ODD = "half", "half, few tiles", "half, odd width"
SINGLE, SINGLE_ODD = "single", "single, odd width"
WAVES = 2  # with fewer tiles than this per multiprocessor, smaller tiles spread the work better


class Tile(NamedTuple):
    """Rows and columns of a tile of the result, depth of one step, warps per program, pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_memory(self, element_size: int) -> int:
        """An upper bound of the bytes per program: operands of all stages, layout conversion, and sums."""
        operands = self.stages * (self.rows + self.columns) * self.depth * element_size
        return operands + self.rows * self.columns * 4 + 1024


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
    """The kinds of tile that `kernel` may use for features of these types."""
    if torch.float32 in dtypes:
        return SINGLE, SINGLE_ODD
    return (HALF, FEW, ODD) if kernel == "differences" else (HALF, ODD)


def differences(
    architecture: str, dtypes: tuple[torch.dtype, torch.dtype], aligned: bool, tokens: int, samples: int
) -> Tile:
    """The tile of the `differences` kernel.

    Args:
        architecture: a key of `ARCHITECTURES`.
        dtypes: of student and teacher.
        aligned: whether every token begins at a multiple of 16 elements.
        tokens: per sample.
        samples: computed in one launch.
    """
    tiles = table()[architecture]["differences"]
    if torch.float32 in dtypes:
        return tiles[SINGLE if aligned else SINGLE_ODD]
    if not aligned:
        return tiles[ODD]
    side = -(-tokens // tiles[HALF].rows)
    enough = WAVES * ARCHITECTURES[architecture].multiprocessors
    return tiles[HALF if samples * side * (side + 1) / 2 >= enough else FEW]


def gradients(architecture: str, student: torch.dtype, aligned: bool) -> Tile:
    """The tile of the `gradients` kernel; see `differences` for the arguments."""
    tiles = table()[architecture]["gradients"]
    if student == torch.float32:
        return tiles[SINGLE if aligned else SINGLE_ODD]
    return tiles[HALF if aligned else ODD]


def shared_memory(architecture: str, student: torch.dtype, teacher: torch.dtype) -> int:
    """Bytes of shared memory per program of the kernel that needs the most."""
    tiles = table()[architecture]
    size = max(student.itemsize, teacher.itemsize)
    pairs = [tiles["differences"][kind].shared_memory(size) for kind in kinds("differences", student, teacher)]
    products = [tiles["gradients"][kind].shared_memory(student.itemsize) for kind in kinds("gradients", student)]
    return max(pairs + products)
