"""Which tiles the kernels take: fixed, for each architecture, in `configurations.json`, with the reason.

Nothing is tried out at run time. The kinds are by element type and by the channels that a head is padded to.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("configurations.json")
WIDTHS = (64, 128, 256)  # channels that heads are padded to


class Tiles(NamedTuple):
    """Pairs and keys of a tile, channels that a product of two tiles takes at a time, warps of a program, stages."""

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
    """The channels a head of `width` is padded to."""
    return next(most for most in WIDTHS if width <= most)


def tiles(architecture: str, dtype: torch.dtype, width: int) -> Tiles:
    """For heads of `width` channels, at most the last of `WIDTHS`."""
    precision = "single" if dtype == torch.float32 else "half"
    return table()[architecture][f"{precision}, {padded(width)} channels"]
