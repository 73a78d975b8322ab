"""`index.jsonl`: what a shard folder holds, as text, and how its rows are packed.

One JSON object a line. The first line is the header:

    {"format": "medalign-index", "version": 1, "checksum": "12345678", "samples": 1797,
     "shards": [{"name": "shard-000000.tar", "bytes": 2048000, "samples": 1000}, ...]}

`checksum` is the CRC-32 of all that follows the line, in eight hexadecimal digits; it may be left out. It comes early,
so that the first bytes of two files tell whether they are the same.

Then one row a sample, in the order of the shards (`members` maps the extension to byte offset in the tar, length in
bytes and CRC-32; `text` holds the characters of question and answer; width and height are those of the first image, 0
without one; further images are members "1.jpg", "2.png", ...):

    {"key": "a", "shard": 0, "task": "vqa", "answer_type": "closed", "width": 512, "height": 384,
     "text": [31, 3], "members": {"jpg": [512, 20480, 305419896], "json": [21504, 311, 19088743]}}

IndexStats, a sample takes a row of ROW, and each image after its first a row of FURTHER.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from medalign.data.samples.sample import ANSWER_TYPES, TASKS, BadSample
from medalign.data.shards.members import ANNOTATION, MASK_PNG, image_members
from medalign.errors import DataError

INDEX_NAME = "index.jsonl"
FORMAT, VERSION = "medalign-index", 1
REBUILD = "pack the shards again, or rebuild the index with `medalign shards index DIR`"

IMAGE, JSON, MASK = range(3)  # kinds of members
TAR_BLOCK = 512  # bytes; members of a tar begin at multiples of it
LARGEST = 0xFFFF_FFFF  # bytes of a member
LONGEST = 0xFFFF  # pixels a side, characters of a text; longer texts count as this long

ROW = np.dtype(
    [
        ("shard", np.uint32),  # within the folder
        ("task", np.int8),
        ("answer_type", np.int8),
        ("size", np.uint16, 2),  # width, height
        ("text", np.uint16, 2),  # characters of question and answer
        ("block", np.uint32, 3),  # first image, JSON, mask; byte offset / TAR_BLOCK
        ("length", np.uint32, 3),  # bytes; 0 where there is no such member
        ("checksum", np.uint32, 3),
    ]
)
EXTRA_IMAGE_DTYPE = np.dtype(
    [
        ("row", np.uint32),  # of the sample, within the folder
        ("block", np.uint32),
        ("length", np.uint32),
        ("checksum", np.uint32),
    ]
)
_CHUNK = 10_000  # rows packed at a time
_BLOCK = 1 << 20  # bytes checked at a time
_NOWHERE = (0, 0, 0)  # block, length and checksum of a member that is not there


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the header lists it."""

    name: str
    size: int  # bytes
    samples: int


class IndexBuffers(NamedTuple):
    """Where packed rows go."""

    rows: np.ndarray  # [samples] of ROW
    key_ends: np.ndarray  # [samples] int64; each key ends here in `keys`
    keys: IO[bytes]  # one after another
    further: IO[bytes]  # FURTHER after FURTHER, by row, then by image


class IndexStats(NamedTuple):
    """How much came into the buffers beside the rows."""

    keys: int  # bytes
    further: int  # images
    max_images: int  # of one sample, at least 1


def entries(header: dict[str, Any]) -> list[ShardEntry]:
    """The shards that the header lists."""
    return [ShardEntry(entry["name"], entry["bytes"], entry["samples"]) for entry in header["shards"]]


def read_header(path: Path, line: bytes) -> dict[str, Any]:
    """The first line of the index at `path`. Raises DataError for one that is no header of this version."""
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT and int(header["samples"]) >= 0
        version = header.get("version")
        if known and version == VERSION:
            entries(header)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not begin with an index header; {REBUILD}") from error
    if not known or version != VERSION:
        found = f"{header['format']} version {version}"
        raise DataError(f"{path} is {found}, wanted {FORMAT} version {VERSION}; {REBUILD}")
    return header


def pack(path: Path, lines: IO[bytes], header: dict[str, Any], buffers: IndexBuffers) -> IndexStats:
    """Pack the lines after the header. Raises DataError naming the line, or what differs from the header."""
    count = key_end = further = 0
    max_images = 1
    shards = entries(header)
    found = np.zeros(len(shards), np.int64)
    for first, rows, keys, others in _chunks(path, lines, len(shards)):
        count = first + len(rows)
        if count > len(buffers.rows):
            break
        buffers.rows[first:count] = rows
        found += np.bincount(rows["shard"], minlength=len(shards))
        if (np.diff(buffers.rows["shard"][max(0, first - 1) : count].astype(np.int64)) < 0).any():
            raise DataError(f"the rows of {path} are not in the order of the shards; {REBUILD}")
        buffers.key_ends[first:count] = key_end + np.cumsum([len(key) for key in keys])
        key_end = int(buffers.key_ends[count - 1])
        buffers.keys.write(b"".join(keys))
        buffers.further.write(others.tobytes())
        further += len(others)
        max_images = max(max_images, 1 + int(np.bincount(others["row"] - first).max(initial=0)))
    _require_counts(path, header, count, found)
    _require_checksum(path, lines, header)
    return IndexStats(key_end, further, max_images)


def _require_counts(path: Path, header: dict[str, Any], count: int, found: np.ndarray) -> None:
    """Raises DataError where the rows, in all or of a shard, are not as many as the header says."""
    if count != header["samples"]:
        more = "more" if count > header["samples"] else count
        raise DataError(f"{path} holds {more} rows but its header says {header['samples']}; {REBUILD}")
    for entry, samples in zip(entries(header), found.tolist(), strict=True):
        if entry.samples != samples:
            raise DataError(f"{path} holds {samples} rows of {entry.name}, its header says {entry.samples}; {REBUILD}")


def _require_checksum(path: Path, lines: IO[bytes], header: dict[str, Any]) -> None:
    """Raises DataError where the rows are not those that the header was written for."""
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


def _chunks(path: Path, lines: IO[bytes], shards: int) -> Iterator[tuple[int, np.ndarray, list[bytes], np.ndarray]]:
    """Number of the first row, packed rows, keys, packed further images."""
    first = 0
    while batch := list(itertools.islice(lines, _CHUNK)):
        rows, keys, others = [], [], []
        for number, line in enumerate(batch, start=first):
            try:
                row = json.loads(line)
                packed, further = _pack(row, shards)
                rows.append(packed)
                keys.append(row["key"].encode())
                others += [(number, *place) for place in further]
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, BadSample) as error:
                raise DataError(f"{path} line {number + 2} is damaged ({error!r}); {REBUILD}") from error
        yield first, np.array(rows, ROW), keys, np.array(others, EXTRA_IMAGE_DTYPE)
        first += len(rows)


def _pack(row: dict[str, Any], shards: int) -> tuple[tuple[Any, ...], list[tuple[int, int, int]]]:
    """The row, and block, length and checksum of each image after its first."""
    if not 0 <= row["shard"] < shards:
        raise ValueError(f"shard {row['shard']} of {shards}")
    places = {name: _place(*place) for name, place in row["members"].items()}
    image, *further = [places.pop(name) for name in image_members(places)] or [_NOWHERE]
    annotation, mask = places.pop(ANNOTATION), places.pop(MASK_PNG, _NOWHERE)
    if places:
        raise ValueError(f"members {', '.join(places)} are of no known kind")
    question, answer = row["text"]
    packed = (
        row["shard"],
        TASKS.index(row["task"]),
        ANSWER_TYPES.index(row["answer_type"]),
        (row["width"], row["height"]),
        (min(question, LONGEST), min(answer, LONGEST)),
        *zip(image, annotation, mask, strict=True),
    )
    return packed, further


def _place(offset: int, length: int, checksum: int) -> tuple[int, int, int]:
    """Block, length and checksum of a member."""
    block, rest = divmod(offset, TAR_BLOCK)
    if rest:
        raise ValueError(f"offset {offset} is no place of a member in a tar")
    return block, length, checksum
