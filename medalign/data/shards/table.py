"""The index of one shard folder as arrays: 50 bytes per sample, its key, and 16 bytes per image after the first.

An index of LARGE samples or more is also stored as `index.bin`, which holds the same content as arrays. It is built
from the text index (see `listing`) on first use, and mapped into memory so that all ranks and workers of a node share
one copy.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medalign.data.shards.listing import (
    EXTRA_IMAGE_DTYPE,
    IMAGE,
    INDEX_NAME,
    REBUILD,
    ROW_DTYPE,
    TAR_BLOCK,
    IndexBuffers,
    ShardEntry,
    entries,
    pack,
    read_header,
)
from medalign.data.storage.cache import file_lock
from medalign.errors import DataError

log = logging.getLogger("medalign")

TABLE_NAME = "index.bin"
LARGE = 100_000  # samples; a smaller index is parsed from text within a second

_MAGIC = b"medalign-index-table-2\n"


class MemberRange(NamedTuple):
    """Location of one file of a sample in its shard."""

    kind: int  # IMAGE, JSON or MASK
    offset: int  # bytes
    length: int  # bytes
    checksum: int  # CRC-32


@dataclass
class IndexTable:
    """The index of one folder.

    It is pickled as a path if the arrays are mapped from a file, and with its arrays otherwise.
    """

    shards: list[ShardEntry]
    rows: np.ndarray  # [n] of ROW_DTYPE, in the order of the shards
    key_ends: np.ndarray  # [n] int64; end of key i in `keys`
    keys: np.ndarray  # [bytes] uint8
    further: np.ndarray  # [m] of EXTRA_IMAGE_DTYPE: images after the first, ordered by row, then by image
    max_images: int  # of one sample, at least 1
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file} if self.file else dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_TableFile(state["file"]).open().__dict__ if state["file"] else state)

    def key(self, i: int) -> str:
        """Return the key of row i."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.keys[start : int(self.key_ends[i])].tobytes().decode()

    def fingerprint(self) -> str:
        """Return a short description that identifies the content of the folder.

        Other samples, another order or another packing give another text. The CRC-32 covers names and sizes of the
        shards, all keys, and the checksums of all members.
        """
        listed = [[entry.name, entry.size, entry.samples] for entry in self.shards]
        checksum = zlib.crc32(json.dumps(listed).encode())
        for column in (self.keys, self.rows["checksum"], self.further["checksum"]):
            for first in range(0, len(column), LARGE):
                checksum = zlib.crc32(column[first : first + LARGE].tobytes(), checksum)
        size = sum(entry.size for entry in self.shards)
        return f"{len(self)} samples in {len(self.shards)} shards of {size} bytes, CRC-32 {checksum:08x}"

    def members(self, i: int, kinds: Sequence[int]) -> list[MemberRange]:
        """Return the members of row i of the given kinds, kind by kind, images in order."""
        row = self.rows[i]
        blocks, lengths, checksums = (row[name].tolist() for name in ("block", "length", "checksum"))
        found: list[MemberRange] = []
        for kind in kinds:
            if lengths[kind]:
                found.append(MemberRange(kind, blocks[kind] * TAR_BLOCK, lengths[kind], checksums[kind]))
            if kind == IMAGE:
                first, last = self._further(np.array([i]))
                extra = self.further[int(first[0]) : int(last[0])].tolist()
                found += [MemberRange(kind, block * TAR_BLOCK, length, crc) for _, block, length, crc in extra]
        return found

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of images of each of these rows, int64 [n]."""
        first, last = self._further(rows)
        return (self.rows["length"][rows, IMAGE] > 0) + last - first

    @property
    def without_image(self) -> int:
        """Number of samples without an image."""
        return len(self) - int(np.count_nonzero(self.rows["length"][:, IMAGE]))

    def _further(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of the further images of each of these rows."""
        wanted = rows.astype(np.uint32)  # with any other type, numpy copies the whole column
        column = self.further["row"]
        return column.searchsorted(wanted, "left"), column.searchsorted(wanted, "right")


def image_share(samples: int, without_image: int) -> str:
    """Describe in words how many of the samples have an image."""
    if not without_image:
        return "all with images"
    return f"{samples - without_image or 'none'} with images, {without_image} without"


def read_table(folder: Path) -> IndexTable:
    """Read the index of a local folder.

    Raises:
        DataError: the index is missing or damaged. The message names the file, the line and the remedy.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        found = f"has no {INDEX_NAME}" if folder.is_dir() else "does not exist"
        raise DataError(f"shard folder {folder} {found}; {REBUILD}, or correct the path")
    with path.open("rb") as file:
        header = read_header(path, file.readline())
    if header["samples"] >= LARGE:
        mapped, stamp = _TableFile(folder / TABLE_NAME), _stamp(path)
        if mapped.is_of(stamp) or _build(mapped, path, stamp):
            return mapped.open()
    return _parse(path)


def _build(target: _TableFile, path: Path, stamp: dict[str, int]) -> bool:
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


class _TableFile:
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

    def open(self) -> IndexTable:
        """Map the table into memory. Raises DataError if the file is damaged."""
        footer = self.footer()
        if footer is None:
            raise DataError(f"{self.path} is not a complete index table; delete it to rebuild it from {INDEX_NAME}")
        count, keys = footer["samples"], footer["keys"]
        return IndexTable(
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
