"""The rows of one shard folder's index as arrays: 50 bytes a sample, beside its key.

`index.jsonl` is text, one JSON object a line. The first line is the header:

    {"format": "medalign-index", "version": 1, "checksum": "12345678", "samples": 1797,
     "shards": [{"name": "shard-000000.tar", "bytes": 2048000, "samples": 1000}, ...]}

`checksum` is the CRC-32 of all that follows the line, in eight hexadecimal digits; it may be left out. It comes early,
so that the first bytes of two files tell whether they are the same.

Then one row a sample, in the order of the shards (`members` maps the extension to byte offset in the tar, length in
bytes and CRC-32; `text` holds the characters of question and answer; width and height are 0 without an image):

    {"key": "a", "shard": 0, "task": "vqa", "answer_type": "closed", "width": 512, "height": 384,
     "text": [31, 3], "members": {"jpg": [512, 20480, 305419896], "json": [21504, 311, 19088743]}}

Beside an index of LARGE samples or more lies `index.bin`, the same as arrays, made from the text at the first need
(see `_TableFile`). It is mapped into memory, so that all ranks and workers of a node share one copy.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medalign.data.samples import ANSWER_TYPES, TASKS
from medalign.errors import DataError

log = logging.getLogger("medalign")

INDEX_NAME, TABLE_NAME = "index.jsonl", "index.bin"
FORMAT, VERSION = "medalign-index", 1
REBUILD = "pack the shards again, or rebuild the index with `medalign shards index DIR`"
LARGE = 100_000  # samples; a smaller index is read from its text in a second

IMAGE, JSON, MASK = range(3)
KIND = {"jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "dcm": IMAGE, "json": JSON, "mask.png": MASK}
TAR_BLOCK = 512  # bytes; members of a tar begin at multiples of it
LONGEST = 0xFFFF  # pixels a side, characters of a text; longer texts count as this long

ROW = np.dtype(
    [
        ("shard", np.uint32),  # within the folder
        ("task", np.int8),
        ("answer_type", np.int8),
        ("size", np.uint16, 2),  # width, height
        ("text", np.uint16, 2),  # characters of question and answer
        ("block", np.uint32, 3),  # image, JSON, mask; byte offset / TAR_BLOCK
        ("length", np.uint32, 3),  # bytes; 0 where there is no such member
        ("checksum", np.uint32, 3),
    ]
)
_MAGIC = b"medalign-index-table-1\n"
_CHUNK = 10_000  # rows packed at a time
_BLOCK = 1 << 20  # bytes checked at a time


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the header lists it."""

    name: str
    size: int  # bytes
    samples: int


@dataclass
class Table:
    """The index of one folder.

    Pickles as a path where the arrays are mapped from a file, else with its arrays.
    """

    shards: list[ShardEntry]
    rows: np.ndarray  # [n] of ROW, in the order of the shards
    key_ends: np.ndarray  # [n] int64; key i ends here in `keys`
    keys: np.ndarray  # [bytes] uint8
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


def read_table(folder: Path) -> Table:
    """The index of a local folder. Raises DataError naming the file, the line and the remedy."""
    path = folder / INDEX_NAME
    if not path.is_file():
        found = f"has no {INDEX_NAME}" if folder.is_dir() else "does not exist"
        raise DataError(f"shard folder {folder} {found}; {REBUILD}, or correct the path")
    with path.open("rb") as file:
        header = _header(path, file.readline())
    if header["samples"] >= LARGE:
        mapped, stamp = _TableFile(folder / TABLE_NAME), _stamp(path)
        footer = mapped.footer()
        if (footer and footer["stamp"] == stamp) or _build(mapped, path, stamp):
            return mapped.open()
    return _parse(path)


def _build(target: _TableFile, path: Path, stamp: dict[str, int]) -> bool:
    """Write index.bin from the text; False where the folder takes no file."""
    try:
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
    """`index.bin`: rows, key ends (from a multiple of 8 bytes on), keys, then a footer in JSON, its length, the magic.

    The footer holds the shards, the counts, and a stamp of the text that the file was made from: its size in bytes and
    the CRC-32 of its first and last 64 KiB. Another stamp means another index.
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
        return footer if _ends_at(footer["samples"]) + 8 * footer["samples"] + footer["keys"] == end - length else None

    def open(self) -> Table:
        """The table, mapped. Raises DataError if the file is damaged."""
        footer = self.footer()
        if footer is None:
            raise DataError(f"{self.path} is no whole index table; remove it, it is made again from {INDEX_NAME}")
        count = footer["samples"]
        return Table(
            [ShardEntry(*entry) for entry in footer["shards"]],
            np.memmap(self.path, ROW, "r", 0, (count,)),
            np.memmap(self.path, np.int64, "r", _ends_at(count), (count,)),
            np.memmap(self.path, np.uint8, "r", _ends_at(count) + 8 * count, (footer["keys"],)),
            self.path,
        )

    def build(self, text: Path, stamp: dict[str, int]) -> None:
        """Make the file from the text, without holding it in memory; it appears whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")  # of whatever node
        try:
            with text.open("rb") as lines, partial.open("w+b") as file:
                header = _header(text, lines.readline())
                count = header["samples"]
                file.truncate(_ends_at(count) + 8 * count)
                rows = np.memmap(file, ROW, "r+", 0, (count,))
                ends = np.memmap(file, np.int64, "r+", _ends_at(count), (count,))
                file.seek(0, os.SEEK_END)
                keys = _fill(text, lines, header, rows, ends, file)
                shards = [[entry.name, entry.size, entry.samples] for entry in _entries(header)]
                footer = json.dumps({"samples": count, "keys": keys, "stamp": stamp, "shards": shards}).encode()
                file.write(footer + len(footer).to_bytes(8, "little") + _MAGIC)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def _ends_at(samples: int) -> int:
    return -(-samples * ROW.itemsize // 8) * 8


def _stamp(path: Path) -> dict[str, int]:
    size, window = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        first = zlib.crc32(file.read(window))
        file.seek(max(0, size - window))
        return {"bytes": size, "first": first, "last": zlib.crc32(file.read(window))}


def _parse(text: Path) -> Table:
    """The whole text in this process's memory."""
    keys = io.BytesIO()
    with text.open("rb") as lines:
        header = _header(text, lines.readline())
        rows, ends = np.zeros(header["samples"], ROW), np.zeros(header["samples"], np.int64)
        _fill(text, lines, header, rows, ends, keys)
    return Table(_entries(header), rows, ends, np.frombuffer(keys.getvalue(), np.uint8))


def _fill(
    path: Path, lines: BinaryIO, header: dict[str, Any], rows: np.ndarray, ends: np.ndarray, keys: BinaryIO
) -> int:
    """Pack the lines after the header into the arrays, the keys one after another. Returns the bytes of the keys."""
    count = end = 0
    entries = _entries(header)
    found = np.zeros(len(entries), np.int64)
    for first, packed, names in _chunks(path, lines, len(entries)):
        count = first + len(packed)
        if count > len(rows):
            break
        rows[first:count] = packed
        found += np.bincount(packed["shard"], minlength=len(entries))
        if (np.diff(rows["shard"][max(0, first - 1) : count].astype(np.int64)) < 0).any():
            raise DataError(f"the rows of {path} are not in the order of the shards; {REBUILD}")
        ends[first:count] = end + np.cumsum([len(name) for name in names])
        end = int(ends[count - 1])
        keys.write(b"".join(names))
    if count != len(rows):
        more = "more" if count > len(rows) else count
        raise DataError(f"{path} holds {more} rows but its header says {len(rows)}; {REBUILD}")
    for entry, samples in zip(entries, found.tolist(), strict=True):
        if entry.samples != samples:
            raise DataError(f"{path} holds {samples} rows of {entry.name}, its header says {entry.samples}; {REBUILD}")
    _check_rows(path, lines, header)
    return end


def _check_rows(path: Path, lines: BinaryIO, header: dict[str, Any]) -> None:
    if "checksum" not in header:
        return
    lines.seek(0)
    lines.readline()
    found = 0
    while block := lines.read(_BLOCK):
        found = zlib.crc32(block, found)
    if f"{found:08x}" != header["checksum"]:
        raise DataError(
            f"the rows of {path} have the checksum {found:08x}, its header says {header['checksum']}: it is damaged; "
            f"copy it again (remove it, if it is itself the copy of a remote one), or {REBUILD}"
        )


def _chunks(path: Path, lines: BinaryIO, shards: int) -> Iterator[tuple[int, np.ndarray, list[bytes]]]:
    """Number of the first row, packed rows, keys."""
    first = 0
    while batch := list(itertools.islice(lines, _CHUNK)):
        packed, names = [], []
        for number, line in enumerate(batch, start=first):
            try:
                row = json.loads(line)
                packed.append(_pack(row, shards))
                names.append(row["key"].encode())
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
                raise DataError(f"{path} line {number + 2} is damaged ({error!r}); {REBUILD}") from error
        yield first, np.array(packed, ROW), names
        first += len(packed)


def _pack(row: dict[str, Any], shards: int) -> tuple:
    if not 0 <= row["shard"] < shards:
        raise ValueError(f"shard {row['shard']} of {shards}")
    blocks, lengths, checksums = [0, 0, 0], [0, 0, 0], [0, 0, 0]
    for extension, (offset, length, checksum) in row["members"].items():
        kind = KIND[extension]
        blocks[kind], rest = divmod(offset, TAR_BLOCK)
        if rest:
            raise ValueError(f"offset {offset} is no place of a member in a tar")
        lengths[kind], checksums[kind] = length, checksum
    question, answer = row["text"]
    return (
        row["shard"],
        TASKS.index(row["task"]),
        ANSWER_TYPES.index(row["answer_type"]),
        (row["width"], row["height"]),
        (min(question, LONGEST), min(answer, LONGEST)),
        tuple(blocks),
        tuple(lengths),
        tuple(checksums),
    )


def _entries(header: dict[str, Any]) -> list[ShardEntry]:
    return [ShardEntry(entry["name"], entry["bytes"], entry["samples"]) for entry in header["shards"]]


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT and int(header["samples"]) >= 0
        version = header.get("version")
        if known and version == VERSION:
            _entries(header)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not begin with an index header; {REBUILD}") from error
    if not known or version != VERSION:
        found = f"{header['format']} version {version}"
        raise DataError(f"{path} is {found}, wanted {FORMAT} version {VERSION}; {REBUILD}")
    return header
