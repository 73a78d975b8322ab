"""Writer of `index.jsonl` (see `listing`). Rows are streamed, so memory use does not grow with the data set."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from medalign.data.shards.listing import FORMAT, INDEX_NAME, VERSION
from medalign.data.shards.table_reader import LARGE, read_table


class IndexFile:
    """The index of a folder, written atomically.

    It replaces an older index when the `with` block ends without an error. The header comes first in the file but is
    complete only at the end, so the rows are kept in an anonymous temporary file until then.

    Args:
        folder: the shard folder.
        allow_empty: whether an index without rows is written.
    """

    def __init__(self, folder: Path, allow_empty: bool = True) -> None:
        self.shards: list[dict[str, Any]] = []  # as the header lists them
        self.samples = 0
        self._checksum = 0  # of the rows, CRC-32
        self._folder = folder
        self._allow_empty = allow_empty
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed in __exit__

    def __enter__(self) -> IndexFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._rows:
            if kind is None and (self.samples or self._allow_empty):
                self._put_in_place()
        if kind is None and self.samples >= LARGE:
            read_table(self._folder)  # also writes the mapped form, once for all readers

    def add(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Add a shard and the rows of its samples."""
        before = self.samples
        for line in map(_line, rows):
            self._rows.write(line)
            self._checksum = zlib.crc32(line, self._checksum)
            self.samples += 1
        self.shards.append({"name": path.name, "bytes": path.stat().st_size, "samples": self.samples - before})

    def _put_in_place(self) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "checksum": f"{self._checksum:08x}",
            "samples": self.samples,
            "shards": self.shards,
        }
        partial = self._folder / f".{INDEX_NAME}.partial"
        with partial.open("wb") as file:
            file.write(_line(header))
            self._rows.seek(0)
            shutil.copyfileobj(self._rows, file)
        partial.replace(self._folder / INDEX_NAME)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
