"""Which tiles the kernels take: fixed, for each architecture, in `tile_table.json`, with the reason.

The table is made offline, by hand or by `medalign bench kernels --tune`; nothing is tried out at run time. The kinds
are by element type and by the channels that a head is padded to.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tile_table.json")
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


def write(place: tuple[str, str], entry: Mapping[str, Any], reason: str, file: Path) -> None:
    """Put an entry into a table on disk; `place` is its architecture and kind."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    architecture, kind = place
    stored[architecture][kind] = {**entry, "reason": reason}
    file.write_text(one_line_an_entry(stored), encoding="utf-8")


def one_line_an_entry(stored: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table as JSON, in the form that it is kept in."""

    def block(items: Mapping[str, str], indent: str) -> str:
        return "{\n" + ",\n".join(f'{indent} "{name}": {text}' for name, text in items.items()) + f"\n{indent}}}"

    entries = {name: {kind: json.dumps(entry) for kind, entry in kinds.items()} for name, kinds in stored.items()}
    return block({name: block(kinds, " ") for name, kinds in entries.items()}, "") + "\n"
