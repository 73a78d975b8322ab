"""Read the index of a shard folder: a small one from its text, a large one from `index.bin`.

An index of LARGE samples or more is also stored as `index.bin` (see `mapped_table`), which holds the same content as
arrays. It is built from the text index (see `listing`) on first use.
"""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path

import numpy as np

from medalign.data.shards.listing import (
    EXTRA_IMAGE_DTYPE,
    INDEX_NAME,
    REBUILD,
    ROW_DTYPE,
    IndexBuffers,
    entries,
    pack,
    read_header,
)
from medalign.data.shards.mapped_table import TABLE_NAME, TableFile
from medalign.data.shards.table import IndexTable
from medalign.data.storage.cache import file_lock
from medalign.errors import DataError

log = logging.getLogger("medalign")

LARGE = 100_000  # samples; a smaller index is parsed from text within a second


def read_table(folder: Path) -> IndexTable:
    """Read the index of a local folder.

    Raises:
        DataError: the index is missing or damaged. The message names the file, the line and the remedy.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(f"shard folder {folder} {_found_instead(folder)}; {REBUILD}, or correct the path")
    with path.open("rb") as file:
        header = read_header(path, file.readline())
    if header["samples"] >= LARGE:
        mapped, stamp = TableFile(folder / TABLE_NAME), _stamp(path)
        if mapped.is_of(stamp) or _build(mapped, path, stamp):
            return mapped.open()
    return _parse(path)


def _found_instead(folder: Path) -> str:
    """Describe a folder without an index. The folder above the splits is the usual mistake."""
    if not folder.is_dir():
        return "does not exist"
    below = sorted(str(path.parent) for path in folder.glob(f"*/{INDEX_NAME}"))
    return f"has no {INDEX_NAME}" + (f", but {', '.join(below)} {'have' if below[1:] else 'has'} one" if below else "")


def _build(target: TableFile, path: Path, stamp: dict[str, int]) -> bool:
    """Write index.bin from the text index. Returns False if the folder is not writable."""
    try:
        with file_lock(path.parent):
            if not target.is_of(stamp):  # another rank may have written it in the meantime
                target.build(path, stamp)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): every process keeps its own copy of the index; run `medalign shards index` "
            "once where the folder is writable",
            target.path,
            error.strerror or error,
        )
        return False
    return True


def _stamp(path: Path) -> dict[str, int]:
    size, window = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        first = zlib.crc32(file.read(window))
        file.seek(max(0, size - window))
        return {"bytes": size, "first": first, "last": zlib.crc32(file.read(window))}


def _parse(text: Path) -> IndexTable:
    """Parse the whole text index into the memory of this process."""
    keys, further = io.BytesIO(), io.BytesIO()
    with text.open("rb") as lines:
        header = read_header(text, lines.readline())
        rows, ends = np.zeros(header["samples"], ROW_DTYPE), np.zeros(header["samples"], np.int64)
        packed = pack(text, lines, header, IndexBuffers(rows, ends, keys, further))
    return IndexTable(
        entries(header),
        rows,
        ends,
        np.frombuffer(keys.getvalue(), np.uint8),
        np.frombuffer(further.getvalue(), EXTRA_IMAGE_DTYPE),
        packed.max_images,
    )
