"""The index of one shard folder as arrays: 50 bytes per sample, its key, and 16 bytes per image after the first."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medalign.data.shards.listing import IMAGE, TAR_BLOCK, ShardEntry

_CHUNK = 100_000  # elements of a column copied at a time


class MemberRange(NamedTuple):
    """Location of one file of a sample in its shard."""

    kind: int  # IMAGE, JSON or MASK
    offset: int  # bytes
    length: int  # bytes
    checksum: int  # CRC-32


@dataclass
class IndexTable:
    """The index of one folder."""

    shards: list[ShardEntry]
    rows: np.ndarray  # [n] of ROW_DTYPE, in the order of the shards
    key_ends: np.ndarray  # [n] int64; end of key i in `keys`
    keys: np.ndarray  # [bytes] uint8
    further: np.ndarray  # [m] of EXTRA_IMAGE_DTYPE: images after the first, ordered by row, then by image
    max_images: int  # of one sample, at least 1

    def __len__(self) -> int:
        return len(self.rows)

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
            for first in range(0, len(column), _CHUNK):
                checksum = zlib.crc32(column[first : first + _CHUNK].tobytes(), checksum)
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
        images: np.ndarray = (self.rows["length"][rows, IMAGE] > 0) + last - first
        return images

    @property
    def image_count(self) -> int:
        """Number of images of all samples."""
        return len(self) - self.without_image + len(self.further)

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
