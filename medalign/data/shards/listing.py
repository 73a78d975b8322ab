"""Format of `index.jsonl`, the text index of a shard folder, and how its rows are packed.

Each line is a JSON object. The first line is the header:

    {"format": "medalign-index", "version": 1, "checksum": "12345678", "samples": 1797,
     "shards": [{"name": "shard-000000.tar", "bytes": 2048000, "samples": 1000}, ...]}

`checksum` is the CRC-32 of everything after the header line, in eight hexadecimal digits; it is optional. It comes
early so that comparing the first bytes of two files is enough to tell whether they are equal.

Then follows one row per sample, in the order of the shards. `members` maps the extension to the byte offset in the
tar, the length in bytes and the CRC-32. `text` holds the number of characters of question and answer. Width and height
are those of the first image, or 0 without an image. Further images are the members "1.jpg", "2.png", ...:

    {"key": "a", "shard": 0, "task": "vqa", "answer_type": "closed", "width": 512, "height": 384,
     "text": [31, 3], "members": {"jpg": [512, 20480, 305419896], "json": [21504, 311, 19088743]}}

In packed form a sample takes one row of ROW_DTYPE, and each image after its first takes one row of EXTRA_IMAGE_DTYPE.
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
MAX_MEMBER_BYTES = 0xFFFF_FFFF
MAX_LENGTH = 0xFFFF  # pixels per side, or characters of a text; longer texts are recorded with this length

ROW_DTYPE = np.dtype(
    [
        ("shard", np.uint32),  # within the folder
        ("task", np.int8),
        ("answer_type", np.int8),
        ("size", np.uint16, 2),  # width, height
        ("text", np.uint16, 2),  # characters of question and answer
        ("block", np.uint32, 3),  # first image, JSON, mask; byte offset / TAR_BLOCK
        ("length", np.uint32, 3),  # bytes; 0 if there is no such member
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
_ABSENT = (0, 0, 0)  # block, length and checksum of a member that does not exist


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the header lists it."""

    name: str
    size: int  # bytes
    samples: int


class IndexBuffers(NamedTuple):
    """Destination of the packed rows."""

    rows: np.ndarray  # [samples] of ROW_DTYPE
    key_ends: np.ndarray  # [samples] int64; end of each key in `keys`
    keys: IO[bytes]  # concatenated
    further: IO[bytes]  # EXTRA_IMAGE_DTYPE rows, ordered by sample, then by image


class IndexStats(NamedTuple):
    """How much was written to the buffers in addition to the rows."""

    keys: int  # bytes
    further: int  # images
    max_images: int  # of one sample, at least 1


def entries(header: dict[str, Any]) -> list[ShardEntry]:
    """Return the shards that the header lists."""
    return [ShardEntry(entry["name"], entry["bytes"], entry["samples"]) for entry in header["shards"]]


def read_header(path: Path, line: bytes) -> dict[str, Any]:
    """Parse the first line of the index at `path`.

    Raises:
        DataError: the line is not a header of this version.
    """
    try:
        header: dict[str, Any] = json.loads(line)
        known = header["format"] == FORMAT and int(header["samples"]) >= 0
        version = header.get("version")
        if known and version == VERSION:
            entries(header)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not begin with an index header; {REBUILD}") from error
    if not known or version != VERSION:
        found = f"{header['format']} version {version}"
        raise DataError(f"{path} is {found}, expected {FORMAT} version {VERSION}; {REBUILD}")
    return header


def pack(path: Path, lines: IO[bytes], header: dict[str, Any], buffers: IndexBuffers) -> IndexStats:
    """Pack the lines after the header into the buffers.

    Raises:
        DataError: a line is damaged, or the rows disagree with the header.
    """
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
    """Raise DataError if the number of rows, in total or per shard, differs from the header."""
    if count != header["samples"]:
        more = "more" if count > header["samples"] else count
        raise DataError(f"{path} has {more} rows but its header lists {header['samples']}; {REBUILD}")
    for entry, samples in zip(entries(header), found.tolist(), strict=True):
        if entry.samples != samples:
            raise DataError(f"{path} has {samples} rows of {entry.name}, its header lists {entry.samples}; {REBUILD}")


def _require_checksum(path: Path, lines: IO[bytes], header: dict[str, Any]) -> None:
    """Raise DataError if the rows are not those that the header was written for."""
    if "checksum" not in header:
        return
    lines.seek(0)
    lines.readline()
    found = 0
    while block := lines.read(_BLOCK):
        found = zlib.crc32(block, found)
    if f"{found:08x}" != header["checksum"]:
        raise DataError(
            f"the rows of {path} have the checksum {found:08x}, its header lists {header['checksum']}: it is damaged; "
            f"copy it again (if it is a cached copy of a remote index, delete it), or {REBUILD}"
        )


def _chunks(path: Path, lines: IO[bytes], shards: int) -> Iterator[tuple[int, np.ndarray, list[bytes], np.ndarray]]:
    """Yield the index of the first row, the packed rows, the keys and the packed further images."""
    first = 0
    while batch := list(itertools.islice(lines, _CHUNK)):
        rows, keys, others = [], [], []
        for index, line in enumerate(batch, start=first):
            try:
                row = json.loads(line)
                packed, further = _pack(row, shards)
                rows.append(packed)
                keys.append(row["key"].encode())
                others += [(index, *location) for location in further]
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, BadSample) as error:
                raise DataError(f"{path} line {index + 2} is damaged ({error!r}); {REBUILD}") from error
        yield first, np.array(rows, ROW_DTYPE), keys, np.array(others, EXTRA_IMAGE_DTYPE)
        first += len(rows)


def _pack(row: dict[str, Any], shards: int) -> tuple[tuple[Any, ...], list[tuple[int, int, int]]]:
    """Return the packed row, and block, length and checksum of each image after the first."""
    if not 0 <= row["shard"] < shards:
        raise ValueError(f"shard {row['shard']} of {shards}")
    locations = {name: _location(*location) for name, location in row["members"].items()}
    image, *further = [locations.pop(name) for name in image_members(locations)] or [_ABSENT]
    annotation, mask = locations.pop(ANNOTATION), locations.pop(MASK_PNG, _ABSENT)
    if locations:
        raise ValueError(f"members {', '.join(locations)} are of an unknown kind")
    question, answer = row["text"]
    packed = (
        row["shard"],
        TASKS.index(row["task"]),
        ANSWER_TYPES.index(row["answer_type"]),
        (row["width"], row["height"]),
        (min(question, MAX_LENGTH), min(answer, MAX_LENGTH)),
        *zip(image, annotation, mask, strict=True),
    )
    return packed, further


def _location(offset: int, length: int, checksum: int) -> tuple[int, int, int]:
    """Block, length and checksum of a member."""
    block, rest = divmod(offset, TAR_BLOCK)
    if rest:
        raise ValueError(f"offset {offset} is not a multiple of {TAR_BLOCK}")
    return block, length, checksum
