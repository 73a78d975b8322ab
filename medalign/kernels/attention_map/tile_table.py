"""The tile sizes of the kernels: fixed for each architecture in `tile_table.json`, with the reason for each.

The table is written offline, by hand or by `medalign bench kernels --tune`; nothing is tuned at run time. An entry
is chosen by element type and padded head width.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tile_table.json")
WIDTHS = (64, 128, 256)  # channels that heads are padded to


class Tiles(NamedTuple):
    """Pairs and keys per tile, channels per step of a product, warps per program, pipeline stages."""

    pairs: int
    keys: int
    channels: int
    warps: int
    stages: int


@functools.cache
def table() -> dict[str, dict[str, Tiles]]:
    """Architecture -> kind -> tiles."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        architecture: {kind: Tiles(*(entry[name] for name in Tiles._fields)) for kind, entry in kinds.items()}
        for architecture, kinds in stored.items()
    }


def padded(width: int) -> int:
    """The number of channels that a head of `width` is padded to."""
    return next(limit for limit in WIDTHS if width <= limit)


def tiles(architecture: str, dtype: torch.dtype, width: int) -> Tiles:
    """The tiles for heads of `width` channels, which must not exceed the last of `WIDTHS`."""
    precision = "single" if dtype == torch.float32 else "half"
    return table()[architecture][f"{precision}, {padded(width)} channels"]
