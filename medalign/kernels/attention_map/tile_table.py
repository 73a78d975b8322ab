"""The tile sizes of the kernels: fixed for each architecture in `tile_table.json`, with the reason for each.

The table is written offline, by hand or by `medalign bench kernels --tune`; nothing is tuned at run time. An entry
is chosen by element type and padded head width.
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


def write(place: tuple[str, str], entry: Mapping[str, Any], reason: str, file: Path) -> None:
    """Write an entry into a table on disk; `place` is its architecture and kind."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    architecture, kind = place
    stored[architecture][kind] = {**entry, "reason": reason}
    file.write_text(one_line_an_entry(stored), encoding="utf-8")


def one_line_an_entry(stored: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table as JSON with one line per entry, as it is stored."""

    def block(items: Mapping[str, str], indent: str) -> str:
        return "{\n" + ",\n".join(f'{indent} "{name}": {text}' for name, text in items.items()) + f"\n{indent}}}"

    entries = {name: {kind: json.dumps(entry) for kind, entry in kinds.items()} for name, kinds in stored.items()}
    return block({name: block(kinds, " ") for name, kinds in entries.items()}, "") + "\n"
