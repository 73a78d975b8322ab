"""Small parquet files for tests."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
