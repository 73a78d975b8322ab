"""Write `tile_table.json`: objects within objects, and the tile sizes of each kind on one line with their reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_entry(place: Sequence[str], tile: Mapping[str, Any], reason: str, file: Path) -> None:
    """Write the tile sizes of one kind into a table.

    Args:
        place: the names that lead to the entry, the architecture first.
        tile: the tile sizes.
        reason: why these sizes were chosen.
        file: the table.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    inner = stored
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = {**tile, "reason": reason}
    file.write_text(format_table(stored) + "\n", encoding="utf-8")


def format_table(stored: Mapping[str, Any], indent: str = "") -> str:
    """Return a table as JSON with one line per entry."""
    if not any(isinstance(value, Mapping) for value in stored.values()):
        return json.dumps(stored)
    lines = [f'{indent} "{name}": {format_table(value, indent + " ")}' for name, value in stored.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
