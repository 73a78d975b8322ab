"""Folders with the weights that a model is published with, by name and shape; their values are holes in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Shapes = dict[str, list[int]]


def facts(shared: Path, name: str) -> dict[str, Any]:
    """What is known of a published model."""
    found: dict[str, Any] = json.loads((shared / "models" / f"student-{name}.json").read_text())
    return found


def shapes(known: dict[str, Any]) -> Shapes:
    """Name and shape of every parameter, repeated blocks written out."""
    rows = next(value for key, value in known.items() if key.startswith("parameters") and isinstance(value, list))
    found: Shapes = {}
    for row in rows:
        first, last = map(int, row.get("i", "0..0").split(".."))
        found |= {row["name"].format(i=i): row["shape"] for i in range(first, last + 1)}
    assert len(found) == known["keys_total"]
    return found


def write_weights(folder: Path, tensors: Shapes) -> None:
    """Write model.safetensors as a sparse file: a header, and nothing behind it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
