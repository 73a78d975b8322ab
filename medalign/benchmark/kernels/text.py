"""Rows as text, with aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with all their keys as header; numbers are right-aligned, and what a row lacks is empty."""
    if not rows:
        return f"{title}\n  nothing"
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, *([_cell(row.get(name, "")) for name in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    numeric = [all(isinstance(row.get(name, 0), (int, float)) for row in rows) for name in head]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    )
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
