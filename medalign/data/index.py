"""The index beside the shards: where every sample lies, so that any sample is read by seek, in any order.

`index.jsonl` is text, one JSON object a line. The first line is the header:

    {"format": "medalign-index", "version": 1, "samples": 1797,
     "shards": [{"name": "shard-000000.tar", "bytes": 2048000, "samples": 1000}, ...]}

Then one row a sample, in the order of the shards (`members` maps the extension to byte offset in the tar, length in
bytes and CRC-32; `text` holds the characters of question and answer; width and height are 0 without an image):

    {"key": "a", "shard": 0, "task": "vqa", "answer_type": "closed", "width": 512, "height": 384,
     "text": [31, 3], "members": {"jpg": [512, 20480, 305419896], "json": [21504, 311, 19088743]}}
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples import ANSWER_TYPES, TASKS, BadSample, decode_image, parse_fields, to_sample
from medalign.errors import DataError

INDEX_NAME = "index.jsonl"
FORMAT, VERSION = "medalign-index", 1
REBUILD = "pack the shards again, or rebuild the index with medalign.data.shards.build_index"

_IMAGE, _JSON, _MASK = range(3)
_KIND = {"jpg": _IMAGE, "jpeg": _IMAGE, "png": _IMAGE, "json": _JSON, "mask.png": _MASK}
_ROW = np.dtype(
    [
        ("shard", np.int32),
        ("task", np.int8),
        ("answer_type", np.int8),
        ("size", np.int32, 2),  # width, height
        ("text", np.int32, 2),  # characters of question and answer
        ("offset", np.int64, 3),  # image, JSON, mask; bytes
        ("length", np.int32, 3),  # bytes; 0 where there is no such member
        ("checksum", np.uint32, 3),
    ]
)
_OPEN_FILES = 64  # shards kept open by one process


class ShardIndex:
    """All samples of one or several shard folders, numbered from 0 in the order of folders, shards and members.

    About 90 bytes of memory a sample. Safe to fork and to pickle: reading uses positioned reads only, and open files
    stay behind.
    """

    def __init__(self, shards: list[Path], rows: np.ndarray, keys: bytes, key_ends: np.ndarray) -> None:
        self._shards = shards
        self._rows = rows
        self._keys = keys
        self._key_ends = key_ends
        self._numbers: dict[str, int] | None = None
        self._files: dict[int, BinaryIO] = {}

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> ShardIndex:
        """Read the indexes of the folders and check that every shard is there with its size.

        Raises DataError naming the file and the remedy.
        """
        folders = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        if not folders:
            raise DataError("no shard folder is named; give at least one")
        shards: list[Path] = []
        tables: list[np.ndarray] = []
        keys: list[bytes] = []
        for folder in folders:
            table, names, folder_keys = _read_index(folder, first_shard=len(shards))
            shards += names
            tables.append(table)
            keys += folder_keys
        ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        return cls(shards, np.concatenate(tables), b"".join(keys), ends)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_numbers": None}

    def key(self, i: int) -> str:
        """Key of sample i."""
        start = int(self._key_ends[i - 1]) if i else 0
        return self._keys[start : int(self._key_ends[i])].decode()

    @property
    def keys(self) -> list[str]:
        """Every key, in order."""
        return [self.key(i) for i in range(len(self))]

    def find(self, key: str) -> int:
        """Number of the (first) sample of this key. Raises DataError if there is none."""
        if self._numbers is None:
            self._numbers = {self.key(i): i for i in reversed(range(len(self)))}
        if key not in self._numbers:
            raise DataError(f"no sample has the key {key!r} among the {len(self)} of {self._shards[0].parent}")
        return self._numbers[key]

    def shard(self, i: int) -> str:
        """Name of the shard of sample i, with its folder: "train/shard-000000.tar"."""
        path = self._shards[self._rows["shard"][i]]
        return f"{path.parent.name}/{path.name}"

    def task(self, i: int) -> str:
        """Task of sample i."""
        return TASKS[self._rows["task"][i]]

    def answer_type(self, i: int) -> str:
        """Answer type of sample i."""
        return ANSWER_TYPES[self._rows["answer_type"][i]]

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of the image of sample i, (0, 0) if it has none."""
        width, height = self._rows["size"][i]
        return int(width), int(height)

    def read(self, i: int) -> Sample:
        """Sample i, decoded. Raises BadSample for this sample's own faults, DataError for the shard's."""
        with _naming(self.shard(i), self.key(i)):
            data = self._member(i, _IMAGE)
            fields = parse_fields(self._member(i, _JSON))
            return to_sample(self.shard(i), self.key(i), fields, decode_image(data) if data else None)

    def read_mask(self, i: int) -> Image.Image | None:
        """The mask of sample i, as stored, or None. Raises as `read` does."""
        with _naming(self.shard(i), self.key(i)):
            data = self._member(i, _MASK)
            return decode_image(data) if data else None

    def _member(self, i: int, kind: int) -> bytes:
        row = self._rows[i]
        offset, length = int(row["offset"][kind]), int(row["length"][kind])
        if not length:
            return b""
        path = self._shards[row["shard"]]
        try:
            data = os.pread(self._file(int(row["shard"])).fileno(), length, offset)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}; was it moved or deleted?") from error
        if len(data) != length:
            raise DataError(f"shard {path} ends before byte {offset + length}; it was changed since the start")
        if zlib.crc32(data) != row["checksum"][kind]:
            raise BadSample("checksum differs from the index; the shard's bytes are damaged")
        return data

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.pop(shard, None) or open(self._shards[shard], "rb", buffering=0)  # noqa: SIM115
        self._files[shard] = file  # the most recently used comes last
        if len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file


class _naming:
    """Puts shard and key before the reason of a BadSample raised inside."""

    def __init__(self, shard: str, key: str) -> None:
        self._name = f"{shard}/{key}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, BadSample):
            raise BadSample(f"{self._name}: {error}") from error


def _read_index(folder: Path, first_shard: int) -> tuple[np.ndarray, list[Path], list[bytes]]:
    path = folder / INDEX_NAME
    if not path.is_file():
        found = "has no index.jsonl" if folder.is_dir() else "does not exist"
        raise DataError(f"shard folder {folder} {found}; {REBUILD}, or correct the path")
    with path.open("rb") as file:
        header = _header(path, file.readline())
        shards = [_checked_shard(folder, entry) for entry in header["shards"]]
        rows = np.zeros(header["samples"], _ROW)
        keys: list[bytes] = []
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                rows[number] = _pack_row(row, first_shard, len(shards))
                keys.append(row["key"].encode())
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise DataError(f"{path} line {number + 2} is damaged ({error!r}); {REBUILD}") from error
    if len(keys) != len(rows):
        raise DataError(f"{path} holds {len(keys)} rows but its header says {len(rows)}; {REBUILD}")
    return rows, shards, keys


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT and int(header["samples"]) >= 0 and bool(header["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not begin with an index header; {REBUILD}") from error
    if not known or header.get("version") != VERSION:
        found = f"{header['format']} version {header.get('version')}"
        raise DataError(f"{path} is {found}, wanted {FORMAT} version {VERSION}; {REBUILD}")
    return header


def _checked_shard(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / entry["name"]
    if not path.is_file():
        raise DataError(f"shard {path} is missing though {folder / INDEX_NAME} names it; restore it, or {REBUILD}")
    if path.stat().st_size != entry["bytes"]:
        raise DataError(
            f"shard {path} has {path.stat().st_size} bytes, the index says {entry['bytes']}; "
            f"it was truncated or replaced: copy it again, or {REBUILD}"
        )
    return path


def _pack_row(row: dict[str, Any], first_shard: int, shards: int) -> np.ndarray:
    packed = np.zeros((), _ROW)
    if not 0 <= row["shard"] < shards:
        raise ValueError(f"shard {row['shard']} of {shards}")
    packed["shard"] = first_shard + row["shard"]
    packed["task"] = TASKS.index(row["task"])
    packed["answer_type"] = ANSWER_TYPES.index(row["answer_type"])
    packed["size"] = row["width"], row["height"]
    packed["text"] = row["text"]
    for extension, (offset, length, checksum) in row["members"].items():
        kind = _KIND[extension]
        packed["offset"][kind], packed["length"][kind], packed["checksum"][kind] = offset, length, checksum
    return packed
