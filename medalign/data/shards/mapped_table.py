"""`index.bin`: the index of a large shard folder as arrays that are mapped into memory.

All ranks and workers of a node share one copy. The file is built from the text index (see `listing`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medalign.data.shards.listing import (
    EXTRA_IMAGE_DTYPE,
    INDEX_NAME,
    ROW_DTYPE,
    IndexBuffers,
    ShardEntry,
    entries,
    pack,
    read_header,
)
from medalign.data.shards.table import IndexTable
from medalign.errors import DataError

TABLE_NAME = "index.bin"

_MAGIC = b"medalign-index-table-2\n"


@dataclass
class MappedTable(IndexTable):
    """An index whose arrays are mapped from a file. It is pickled as the path of the file."""

    file: Path

    def __reduce__(self) -> tuple[Callable[[Path], MappedTable], tuple[Path]]:
        return _open, (self.file,)


def _open(path: Path) -> MappedTable:
    return TableFile(path).open()


class TableFile:
    """`index.bin`: rows, key ends, keys, further images, a JSON footer, the length of the footer, and the magic bytes.

    Key ends and further images are aligned to 8 bytes. The footer holds the shards, the counts, and a stamp of the text
    index that the file was built from: its size in bytes and the CRC-32 of its first and last 64 KiB. A file with
    another stamp is out of date.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def footer(self) -> dict[str, Any] | None:
        """Return the footer, or None if the file is missing or incomplete."""
        try:
            with self.path.open("rb") as file:
                end = file.seek(-len(_MAGIC) - 8, os.SEEK_END)
                length = int.from_bytes(file.read(8), "little")
                if file.read() != _MAGIC:
                    return None
                file.seek(end - length)
                footer = json.loads(file.read(length))
        except (OSError, ValueError):
            return None
        further_at = _further_at(footer["samples"], footer["keys"])
        return footer if further_at + EXTRA_IMAGE_DTYPE.itemsize * footer["further"] == end - length else None

    def is_of(self, stamp: dict[str, int]) -> bool:
        """Return whether the file is complete and was built from the text index with this stamp."""
        footer = self.footer()
        return footer is not None and footer["stamp"] == stamp

    def open(self) -> MappedTable:
        """Map the table into memory. Raises DataError if the file is damaged."""
        footer = self.footer()
        if footer is None:
            raise DataError(f"{self.path} is not a complete index table; delete it to rebuild it from {INDEX_NAME}")
        count, keys = footer["samples"], footer["keys"]
        return MappedTable(
            [ShardEntry(*entry) for entry in footer["shards"]],
            self._mapped(ROW_DTYPE, 0, count),
            self._mapped(np.dtype(np.int64), _ends_at(count), count),
            self._mapped(np.dtype(np.uint8), _ends_at(count) + 8 * count, keys),
            self._mapped(EXTRA_IMAGE_DTYPE, _further_at(count, keys), footer["further"]),
            footer["max_images"],
            self.path,
        )

    def _mapped(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        if not count:  # an empty range cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype, "r", start, (count,))

    def build(self, text: Path, stamp: dict[str, int]) -> None:
        """Build the file from the text index without loading it into memory; the file is replaced atomically."""
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")  # unique across nodes
        try:
            with (
                text.open("rb") as lines,
                partial.open("w+b") as file,
                tempfile.TemporaryFile(
                    dir=self.path.parent
                ) as further,  # follows the keys, so its offset is not known yet
            ):
                header = read_header(text, lines.readline())
                count = header["samples"]
                file.truncate(_ends_at(count) + 8 * count)
                rows = np.memmap(file, ROW_DTYPE, "r+", 0, (count,))
                ends = np.memmap(file, np.int64, "r+", _ends_at(count), (count,))
                file.seek(0, os.SEEK_END)
                packed = pack(text, lines, header, IndexBuffers(rows, ends, file, further))
                file.write(b"\0" * (_further_at(count, packed.keys) - file.tell()))
                further.seek(0)
                shutil.copyfileobj(further, file)
                shards = [[entry.name, entry.size, entry.samples] for entry in entries(header)]
                footer = {"samples": count, **packed._asdict(), "stamp": stamp, "shards": shards}
                body = json.dumps(footer).encode()
                file.write(body + len(body).to_bytes(8, "little") + _MAGIC)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def _ends_at(samples: int) -> int:
    return _align8(samples * ROW_DTYPE.itemsize)


def _further_at(samples: int, keys: int) -> int:
    return _align8(_ends_at(samples) + 8 * samples + keys)


def _align8(position: int) -> int:
    return -(-position // 8) * 8
