"""All samples of one or several shard folders: where each lies, so that any is read by position, in any order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample, image_name, sample_context
from medalign.data.samples.decode import decode_image, decode_mask
from medalign.data.samples.faults import decoding
from medalign.data.samples.sample import ANSWER_TYPES, TASKS, parse_fields, to_sample
from medalign.data.shards.listing import IMAGE, INDEX_NAME, JSON, MASK, REBUILD
from medalign.data.shards.table import Member, Table, read_table
from medalign.data.storage.byte_ranges import Storage, StorageOptions, fetched_folder, is_remote, storage_of
from medalign.errors import DataError

_GAP = 1 << 16  # bytes read in vain rather than asked for one by one


class ShardIndex:
    """All samples of one or several shard folders, numbered from 0 in the order of folders, shards and members.

    Safe to fork and to pickle: reading uses positioned reads only, and open files stay behind.
    """

    def __init__(self, folders: Sequence[str], tables: Sequence[Table], access: StorageOptions) -> None:
        self._folders = [folder.rstrip("/") for folder in folders]
        self._tables = list(tables)
        self._firsts = np.cumsum([0, *(len(table) for table in tables)])
        self._storages: list[Storage] = [storage_of(folder, access) for folder in folders]
        self._numbers: dict[str, int] | None = None

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path], access: StorageOptions | None = None) -> ShardIndex:
        """Read the indexes of the folders (or addresses) and check that every local shard is there with its size.

        Raises DataError naming the file and the remedy.
        """
        folders = [str(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        if not folders:
            raise DataError("no shard folder is named; give at least one")
        access = access or StorageOptions()
        tables = []
        for folder in folders:
            if is_remote(folder):  # its shards are looked at when they are read
                tables.append(read_table(fetched_folder(folder, (INDEX_NAME,), access)))
            else:
                tables.append(read_table(Path(folder)))
                _check_shards(Path(folder), tables[-1])
            if not len(tables[-1]):
                raise DataError(f"shard folder {folder} holds no sample; {REBUILD}, or leave the folder out")
        return cls(folders, tables, access)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numbers": None}

    def shard_sizes(self, folder: int) -> np.ndarray:
        """Samples of each shard of a folder, in the order of the numbers, int64."""
        return np.array([entry.samples for entry in self._tables[folder].shards], dtype=np.int64)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """For each sample how long it is beside others, int64: an image outweighs any text; then characters."""
        lengths = np.empty(len(numbers), dtype=np.int64)
        owners = np.searchsorted(self._firsts, numbers, side="right") - 1
        for folder in np.unique(owners):
            here = owners == folder
            table, rows = self._tables[folder], numbers[here] - self._firsts[folder]
            characters = table.rows[rows]["text"].astype(np.int64).sum(axis=1)
            lengths[here] = (table.images(rows) << 32) + characters
        return lengths

    def fingerprint(self) -> tuple[str, ...]:
        """What each folder holds, in short, wherever the folders lie."""
        return tuple(table.fingerprint() for table in self._tables)

    def without_image(self, folder: int) -> int:
        """How many samples of a folder have no image."""
        return self._tables[folder].without_image

    @property
    def max_images(self) -> int:
        """Images of the sample that has most, at least 1."""
        return max(table.max_images for table in self._tables)

    def key(self, i: int) -> str:
        """Key of sample i."""
        table, row, _ = self._find_row(i)
        return table.key(row)

    @property
    def keys(self) -> list[str]:
        """Every key, in order."""
        return [self.key(i) for i in range(len(self))]

    def find(self, key: str) -> int:
        """Number of the (first) sample of this key. Raises DataError if there is none."""
        if self._numbers is None:
            self._numbers = {self.key(i): i for i in reversed(range(len(self)))}
        if key not in self._numbers:
            raise DataError(f"no sample has the key {key!r} among the {len(self)} of {', '.join(self._folders)}")
        return self._numbers[key]

    def shard(self, i: int) -> str:
        """Name of the shard of sample i, with its folder: "train/shard-000000.tar"."""
        return "/".join(self._place(i).split("/")[-2:])

    def task(self, i: int) -> str:
        """Task of sample i."""
        return TASKS[self._row(i)["task"]]

    def answer_type(self, i: int) -> str:
        """Answer type of sample i."""
        return ANSWER_TYPES[self._row(i)["answer_type"]]

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of the first image of sample i, (0, 0) if it has none."""
        width, height = self._row(i)["size"]
        return int(width), int(height)

    def read(self, i: int, at_least: int = 0) -> Sample:
        """Sample i, decoded; a JPEG far larger than `at_least` pixels at reduced scale (see `decode_image`).

        Raises BadSample for this sample's own faults, DataError for the shard's.
        """
        with self._naming(i):
            found = self._contents(i, (IMAGE, JSON))
            fields = parse_fields(found[JSON][0])
            images = []
            for number, data in enumerate(found[IMAGE]):
                with sample_context(image_name(number, len(found[IMAGE]))), decoding():
                    images.append(decode_image(data, at_least))
            return to_sample(self.shard(i), self.key(i), fields, images, self.size(i))

    def read_mask(self, i: int) -> Image.Image | None:
        """The mask of the first image of sample i, as stored, or None. Raises as `read` does."""
        with self._naming(i):
            found = self._contents(i, (MASK,))[MASK]
            return decode_mask(found[0]) if found else None

    def prefetch(self, numbers: Sequence[int]) -> None:
        """These samples will be read soon: remote storage begins to fetch them."""
        owners = (np.searchsorted(self._firsts, numbers, side="right") - 1).tolist()
        for folder in set(owners):
            mine = [i for i, owner in zip(numbers, owners, strict=True) if owner == folder]
            ranges = [(self._place(i), *span) for i in mine for span in _spans(self._members(i, (IMAGE, JSON)))]
            self._storages[folder].prefetch(ranges)

    def _contents(self, i: int, kinds: Sequence[int]) -> dict[int, list[bytes]]:
        """The bytes of the members of sample i that are of these kinds, by kind, images in their order."""
        try:
            return self._read_contents(i, kinds)
        except BadSample:  # a cache may hold what its disk damaged, or bytes of an earlier shard of this name
            return self._read_contents(i, kinds, bypass_cache=True)

    def _read_contents(self, i: int, kinds: Sequence[int], bypass_cache: bool = False) -> dict[int, list[bytes]]:
        members, storage, place = self._members(i, kinds), self._storages[self._find_row(i)[2]], self._place(i)
        images = sum(member.kind == IMAGE for member in members)
        reads = [(start, storage.read(place, start, length, bypass_cache)) for start, length in _spans(members)]
        contents: dict[int, list[bytes]] = {kind: [] for kind in kinds}
        for kind, offset, length, checksum in members:
            start, read = next((start, read) for start, read in reads if start <= offset <= start + len(read))
            data = read[offset - start : offset - start + length]
            with sample_context(image_name(len(contents[kind]), images) if kind == IMAGE else ""):
                if zlib.crc32(data) != checksum:
                    raise BadSample("checksum differs from the index; the shard's bytes are damaged")
            contents[kind].append(data)
        return contents

    def _members(self, i: int, kinds: Sequence[int]) -> list[Member]:
        table, row, _ = self._find_row(i)
        return table.members(row, kinds)

    def _naming(self, i: int) -> sample_context:
        """Puts shard and key before the reason of a BadSample raised inside."""
        return sample_context(f"{self.shard(i)}/{self.key(i)}")

    def _find_row(self, i: int) -> tuple[Table, int, int]:
        """Table, row in it, and number of its folder."""
        folder = int(np.searchsorted(self._firsts, i, side="right")) - 1 if len(self._tables) > 1 else 0
        return self._tables[folder], i - int(self._firsts[folder]), folder

    def _row(self, i: int) -> np.void:
        table, row, _ = self._find_row(i)
        return table.rows[row]

    def _place(self, i: int) -> str:
        table, row, folder = self._find_row(i)
        return f"{self._folders[folder]}/{table.shards[table.rows['shard'][row]].name}"


def _spans(members: Sequence[Member]) -> list[tuple[int, int]]:
    """Offset and length of the reads that bring these members: neighbors in one."""
    spans: list[tuple[int, int]] = []
    for offset, length in sorted((member.offset, member.length) for member in members):
        if spans and offset - sum(spans[-1]) <= _GAP:
            start, _ = spans.pop()
            spans.append((start, offset + length - start))
        else:
            spans.append((offset, length))
    return spans


def _check_shards(folder: Path, table: Table) -> None:
    for entry in table.shards:
        path = folder / entry.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing though {folder / INDEX_NAME} names it; restore it, or {REBUILD}")
        if path.stat().st_size != entry.size:
            raise DataError(
                f"shard {path} has {path.stat().st_size} bytes, the index says {entry.size}; "
                f"it was truncated or replaced: copy it again, or {REBUILD}"
            )
