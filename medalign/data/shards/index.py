"""Random access to the samples of one or several shard folders."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample, image_name, sample_context
from medalign.data.samples.decode import decode_image, decode_mask
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import ANSWER_TYPES, TASKS, parse_fields, to_sample
from medalign.data.shards.listing import IMAGE, INDEX_NAME, JSON, MASK, REBUILD
from medalign.data.shards.table import IndexTable, MemberRange
from medalign.data.shards.table_reader import read_table
from medalign.data.storage.byte_ranges import Storage, StorageOptions, is_remote, storage_of
from medalign.data.storage.fetched_folder import fetched_folder
from medalign.errors import DataError

_GAP = 1 << 16  # bytes; a gap up to this size is read and discarded, which is faster than a second request


class ShardIndex:
    """All samples of one or several shard folders, indexed from 0 in the order of folders, shards and members.

    An index can be pickled and survives a fork: it only uses positioned reads, and open files are not pickled.
    """

    def __init__(self, folders: Sequence[str], tables: Sequence[IndexTable], options: StorageOptions) -> None:
        self._folders = [folder.rstrip("/") for folder in folders]
        self._tables = list(tables)
        self._firsts = np.cumsum([0, *(len(table) for table in tables)])
        self._storages: list[Storage] = [storage_of(folder, options) for folder in folders]
        self._index_of_key: dict[str, int] | None = None

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path], options: StorageOptions | None = None) -> ShardIndex:
        """Read the indexes of the folders and check that every local shard exists and has the indexed size.

        Args:
            paths: local folders or remote addresses.
            options: how shards are read; None takes the defaults.

        Raises:
            DataError: an index or a shard is missing or damaged. The message names the file and the remedy.
        """
        folders = [str(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        if not folders:
            raise DataError("no shard folder is given; give at least one")
        options = options or StorageOptions()
        tables = []
        for folder in folders:
            if is_remote(folder):  # remote shards are checked when they are read
                tables.append(read_table(fetched_folder(folder, (INDEX_NAME,), options)))
            else:
                tables.append(read_table(Path(folder)))
                _check_shards(Path(folder), tables[-1])
            if not len(tables[-1]):
                raise DataError(f"shard folder {folder} contains no sample; {REBUILD}, or leave the folder out")
        return cls(folders, tables, options)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index_of_key": None}

    def shard_sizes(self, folder: int) -> np.ndarray:
        """Number of samples of each shard of a folder, in index order, int64 [shards]."""
        return np.array([entry.samples for entry in self._tables[folder].shards], dtype=np.int64)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Relative length of each sample, int64 [n]. Samples compare by number of images, then by characters."""
        lengths = np.empty(len(indices), dtype=np.int64)
        owners = np.searchsorted(self._firsts, indices, side="right") - 1
        for folder in np.unique(owners):
            here = owners == folder
            table, rows = self._tables[folder], indices[here] - self._firsts[folder]
            characters = table.rows[rows]["text"].astype(np.int64).sum(axis=1)
            lengths[here] = (table.images(rows) << 32) + characters
        return lengths

    def fingerprint(self) -> tuple[str, ...]:
        """Fingerprint of the content of each folder. It does not depend on the location of the folder."""
        return tuple(table.fingerprint() for table in self._tables)

    def without_image(self, folder: int) -> int:
        """Number of samples of a folder that have no image."""
        return self._tables[folder].without_image

    @property
    def image_count(self) -> int:
        """Number of images of all samples; an image that several samples show is counted for each."""
        return sum(table.image_count for table in self._tables)

    @property
    def max_images(self) -> int:
        """Largest number of images in a sample, at least 1."""
        return max(table.max_images for table in self._tables)

    def key(self, i: int) -> str:
        """Return the key of sample i."""
        table, row, _ = self._find_row(i)
        return table.key(row)

    @property
    def keys(self) -> list[str]:
        """All keys, in index order."""
        return [self.key(i) for i in range(len(self))]

    def index_of_key(self, key: str) -> int:
        """Return the index of the first sample with this key.

        Raises:
            DataError: no sample has this key.
        """
        if self._index_of_key is None:
            self._index_of_key = {self.key(i): i for i in reversed(range(len(self)))}
        if key not in self._index_of_key:
            raise DataError(f"no sample has the key {key!r} among the {len(self)} of {', '.join(self._folders)}")
        return self._index_of_key[key]

    def shard(self, i: int) -> str:
        """Return the shard of sample i with its folder, for example "train/shard-000000.tar"."""
        return "/".join(self._place(i).split("/")[-2:])

    def task(self, i: int) -> str:
        """Return the task of sample i."""
        return TASKS[self._row(i)["task"]]

    def answer_type(self, i: int) -> str:
        """Return the answer type of sample i."""
        return ANSWER_TYPES[self._row(i)["answer_type"]]

    def size(self, i: int) -> tuple[int, int]:
        """Return width and height of the first image of sample i in pixels, or (0, 0) if it has no image."""
        width, height = self._row(i)["size"]
        return int(width), int(height)

    def read(self, i: int, at_least: int = 0) -> Sample:
        """Read and decode sample i.

        Args:
            i: the index of the sample.
            at_least: pixels that the longer side needs; larger JPEGs are decoded at reduced scale (see `decode_image`).

        Raises:
            BadSample: this sample is damaged or invalid.
            DataError: the shard cannot be read.
        """
        with self._sample_context(i):
            found = self._contents(i, (IMAGE, JSON))
            fields = parse_fields(found[JSON][0])
            images = []
            for position, data in enumerate(found[IMAGE]):
                with sample_context(image_name(position, len(found[IMAGE]))), as_bad_sample():
                    images.append(decode_image(data, at_least))
            return to_sample(self.shard(i), self.key(i), fields, images, self.size(i))

    def read_fields(self, i: int) -> dict[str, Any]:
        """Read the annotation of sample i, and no image. Raises like `read`."""
        with self._sample_context(i):
            return parse_fields(self._contents(i, (JSON,))[JSON][0])

    def read_mask(self, i: int) -> Image.Image | None:
        """Read the mask of the first image of sample i as stored, or return None. Raises like `read`."""
        with self._sample_context(i):
            found = self._contents(i, (MASK,))[MASK]
            return decode_mask(found[0]) if found else None

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to fetch these samples from remote storage, since they will be read soon."""
        owners = (np.searchsorted(self._firsts, indices, side="right") - 1).tolist()
        for folder in set(owners):
            mine = [i for i, owner in zip(indices, owners, strict=True) if owner == folder]
            ranges = [(self._place(i), *span) for i in mine for span in _spans(self._members(i, (IMAGE, JSON)))]
            self._storages[folder].prefetch(ranges)

    def _contents(self, i: int, kinds: Sequence[int]) -> dict[int, list[bytes]]:
        """Bytes of the members of sample i by kind, images in order."""
        try:
            return self._read_contents(i, kinds)
        except BadSample:  # the cache may hold damaged bytes, or bytes of an older shard with this name
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
                    raise BadSample("checksum differs from the index; the bytes of the shard are damaged")
            contents[kind].append(data)
        return contents

    def _members(self, i: int, kinds: Sequence[int]) -> list[MemberRange]:
        table, row, _ = self._find_row(i)
        return table.members(row, kinds)

    def _sample_context(self, i: int) -> AbstractContextManager[None]:
        """Prefix the reason of a BadSample raised inside with shard and key."""
        return sample_context(f"{self.shard(i)}/{self.key(i)}")

    def _find_row(self, i: int) -> tuple[IndexTable, int, int]:
        """IndexTable of the folder of sample i, row in this table, and index of the folder."""
        folder = int(np.searchsorted(self._firsts, i, side="right")) - 1 if len(self._tables) > 1 else 0
        return self._tables[folder], i - int(self._firsts[folder]), folder

    def _row(self, i: int) -> np.void:
        table, position, _ = self._find_row(i)
        row: np.void = table.rows[position]
        return row

    def _place(self, i: int) -> str:
        table, row, folder = self._find_row(i)
        return f"{self._folders[folder]}/{table.shards[table.rows['shard'][row]].name}"


def _spans(members: Sequence[MemberRange]) -> list[tuple[int, int]]:
    """Offset and length of the reads that cover these members; nearby members share a read."""
    spans: list[tuple[int, int]] = []
    for offset, length in sorted((member.offset, member.length) for member in members):
        if spans and offset - sum(spans[-1]) <= _GAP:
            start, _ = spans.pop()
            spans.append((start, offset + length - start))
        else:
            spans.append((offset, length))
    return spans


def _check_shards(folder: Path, table: IndexTable) -> None:
    for entry in table.shards:
        path = folder / entry.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing but {folder / INDEX_NAME} lists it; restore it, or {REBUILD}")
        if path.stat().st_size != entry.size:
            raise DataError(
                f"shard {path} has {path.stat().st_size} bytes, the index says {entry.size}; "
                f"it was truncated or replaced: copy it again, or {REBUILD}"
            )
