"""The index of one shard folder as arrays: 50 bytes a sample beside its key, and 16 for each image after its first.

Beside an index of LARGE samples or more lies `index.bin`, the same as arrays, made from the text (see `listing`) at the
first need. It is mapped into memory, so that all ranks and workers of a node share one copy.
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
    ROW,
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
LARGE = 100_000  # samples; a smaller index is read from its text in a second

_MAGIC = b"medalign-index-table-2\n"


class Member(NamedTuple):
    """Where one file of a sample lies in its shard."""

    kind: int  # IMAGE, JSON or MASK
    offset: int  # bytes
    length: int  # bytes
    checksum: int  # CRC-32


@dataclass
class Table:
    """The index of one folder.

    Pickles as a path where the arrays are mapped from a file, else with its arrays.
    """

    shards: list[ShardEntry]
    rows: np.ndarray  # [n] of ROW, in the order of the shards
    key_ends: np.ndarray  # [n] int64; key i ends here in `keys`
    keys: np.ndarray  # [bytes] uint8
    further: np.ndarray  # [m] of FURTHER: the images after the first of their sample, by row, then by image
    max_images: int  # of one sample, at least 1
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file} if self.file else dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_TableFile(state["file"]).open().__dict__ if state["file"] else state)

    def key(self, i: int) -> str:
        """Key of row i."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.keys[start : int(self.key_ends[i])].tobytes().decode()

    def fingerprint(self) -> str:
        """What the folder holds, in short. Other samples, or the same in another order or packing, give another text.

        The CRC-32 is over names and sizes of the shards, all keys, and the checksums of all members.
        """
        listed = [[entry.name, entry.size, entry.samples] for entry in self.shards]
        checksum = zlib.crc32(json.dumps(listed).encode())
        for column in (self.keys, self.rows["checksum"], self.further["checksum"]):
            for first in range(0, len(column), LARGE):
                checksum = zlib.crc32(column[first : first + LARGE].tobytes(), checksum)
        size = sum(entry.size for entry in self.shards)
        return f"{len(self)} samples in {len(self.shards)} shards of {size} bytes, CRC-32 {checksum:08x}"

    def members(self, i: int, kinds: Sequence[int]) -> list[Member]:
        """The members of row i that are of these kinds, kind by kind; images in their order."""
        row = self.rows[i]
        blocks, lengths, checksums = (row[name].tolist() for name in ("block", "length", "checksum"))
        found: list[Member] = []
        for kind in kinds:
            if lengths[kind]:
                found.append(Member(kind, blocks[kind] * TAR_BLOCK, lengths[kind], checksums[kind]))
            if kind == IMAGE:
                first, last = self._further(np.array([i]))
                places = self.further[int(first[0]) : int(last[0])].tolist()
                found += [Member(kind, block * TAR_BLOCK, length, checksum) for _, block, length, checksum in places]
        return found

    def images(self, rows: np.ndarray) -> np.ndarray:
        """How many images each of these rows has, int64."""
        first, last = self._further(rows)
        return (self.rows["length"][rows, IMAGE] > 0) + last - first

    @property
    def without_image(self) -> int:
        """How many samples have no image."""
        return len(self) - int(np.count_nonzero(self.rows["length"][:, IMAGE]))

    def _further(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the further images of each of these rows begin and end."""
        wanted = rows.astype(np.uint32)  # for any other type numpy would copy the whole column
        column = self.further["row"]
        return column.searchsorted(wanted, "left"), column.searchsorted(wanted, "right")


def image_share(samples: int, without_image: int) -> str:
    """How many of the samples have an image, in words."""
    if not without_image:
        return "all with images"
    return f"{samples - without_image or 'none'} with images, {without_image} without"


def read_table(folder: Path) -> Table:
    """The index of a local folder. Raises DataError naming the file, the line and the remedy."""
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
    """Write index.bin from the text; False where the folder takes no file."""
    try:
        with file_lock(path.parent):
            if not target.is_of(stamp):  # another rank may have made it meanwhile
                target.build(path, stamp)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): every process holds its own copy of the index; let `medalign shards index` "
            "write it once where the folder is writable",
            target.path,
            error.strerror or error,
        )
        return False
    return True


class _TableFile:
    """`index.bin`: rows, key ends, keys, further images, then a footer in JSON, its length, the magic.

    Key ends and further images begin at the next multiple of 8 bytes. The footer holds the shards, the counts, and a
    stamp of the text that the file was made from: its size in bytes and the CRC-32 of its first and last 64 KiB.
    Another stamp means another index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def footer(self) -> dict[str, Any] | None:
        """The footer; None without a whole file."""
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
        """Whether it is whole and was made from the text of this stamp."""
        footer = self.footer()
        return footer is not None and footer["stamp"] == stamp

    def open(self) -> Table:
        """The table, mapped. Raises DataError if the file is damaged."""
        footer = self.footer()
        if footer is None:
            raise DataError(f"{self.path} is no whole index table; remove it, it is made again from {INDEX_NAME}")
        count, keys = footer["samples"], footer["keys"]
        return Table(
            [ShardEntry(*entry) for entry in footer["shards"]],
            self._mapped(ROW, 0, count),
            self._mapped(np.dtype(np.int64), _ends_at(count), count),
            self._mapped(np.dtype(np.uint8), _ends_at(count) + 8 * count, keys),
            self._mapped(EXTRA_IMAGE_DTYPE, _further_at(count, keys), footer["further"]),
            footer["max_images"],
            self.path,
        )

    def _mapped(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        if not count:  # nothing cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype, "r", start, (count,))

    def build(self, text: Path, stamp: dict[str, int]) -> None:
        """Make the file from the text, without holding it in memory; it appears whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")  # of whatever node
        try:
            with (
                text.open("rb") as lines,
                partial.open("w+b") as file,
                tempfile.TemporaryFile(dir=self.path.parent) as further,  # how long the keys before it are shows late
            ):
                header = read_header(text, lines.readline())
                count = header["samples"]
                file.truncate(_ends_at(count) + 8 * count)
                rows = np.memmap(file, ROW, "r+", 0, (count,))
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
    return _at_eight(samples * ROW.itemsize)


def _further_at(samples: int, keys: int) -> int:
    return _at_eight(_ends_at(samples) + 8 * samples + keys)


def _at_eight(position: int) -> int:
    return -(-position // 8) * 8


def _stamp(path: Path) -> dict[str, int]:
    size, window = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        first = zlib.crc32(file.read(window))
        file.seek(max(0, size - window))
        return {"bytes": size, "first": first, "last": zlib.crc32(file.read(window))}


def _parse(text: Path) -> Table:
    """The whole text in this process's memory."""
    keys, further = io.BytesIO(), io.BytesIO()
    with text.open("rb") as lines:
        header = read_header(text, lines.readline())
        rows, ends = np.zeros(header["samples"], ROW), np.zeros(header["samples"], np.int64)
        packed = pack(text, lines, header, IndexBuffers(rows, ends, keys, further))
    return Table(
        entries(header),
        rows,
        ends,
        np.frombuffer(keys.getvalue(), np.uint8),
        np.frombuffer(further.getvalue(), EXTRA_IMAGE_DTYPE),
        packed.max_images,
    )
