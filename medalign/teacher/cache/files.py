"""The files of a cache: targets of many images in each, found by the hash of the canvas.

Each file of safetensors holds `digests` uint8 [n, 16] and, for the same n images, what the teacher saw: `features` in
float16 and the rest in float32, on the teacher's grid. A file is complete or absent. Ranks write files of their own and
need not know of each other.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medalign.errors import ConfigError, DataError
from medalign.observability.files import write_text
from medalign.teacher.cache.identity import DIGEST_BYTES
from medalign.teacher.model import FEATURES

DIGESTS = "digests"
_FILES, _PARTIAL = "part-*.safetensors", ".partial"
_FLUSH_BYTES = 128 * 2**20


class CacheFiles:
    """Reads the targets of images.

    Args:
        folder: the cache.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = sorted(folder.glob(_FILES))
        stored = [self._read(file, [DIGESTS])[DIGESTS].numpy() for file in self._files]
        self._digests = np.concatenate([np.zeros((0, DIGEST_BYTES), np.uint8), *stored])
        self._firsts = np.cumsum([0, *map(len, stored)])  # of each file, the number of images before it
        heads = self._digests[:, :8].copy().view(np.uint64)[:, 0]
        self._order = np.argsort(heads, kind="stable")
        self._heads = heads[self._order]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, digest: bytes) -> bool:
        return self._find(digest) is not None

    def read(self, digest: bytes, names: Iterable[str]) -> dict[str, torch.Tensor] | None:
        """Return the tensors of one image by name, or None if it is not in the cache.

        Raises:
            DataError: the file cannot be read.
        """
        place = self._find(digest)
        if place is None:
            return None
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return self._read(self._files[number], names, place - int(self._firsts[number]))

    def covers(self, fingerprint: str) -> bool:
        """Return whether all images of a folder of shards, given by its fingerprint, have been put into the cache."""
        worlds: dict[str, int] = {}
        for file in self.folder.glob(f"covered-{_short_hash(fingerprint)}-*-of-*.json"):
            world = file.stem.rpartition("-")[2]
            worlds[world] = worlds.get(world, 0) + 1
        return any(ranks == int(world) for world, ranks in worlds.items())

    def _find(self, digest: bytes) -> int | None:
        wanted = np.frombuffer(digest, np.uint8)
        head = wanted[:8].view(np.uint64)[0]
        first, last = np.searchsorted(self._heads, head, "left"), np.searchsorted(self._heads, head, "right")
        same = (place for place in self._order[first:last] if np.array_equal(self._digests[place], wanted))
        found = next(same, None)
        return None if found is None else int(found)

    @staticmethod
    def _read(file: Path, names: Iterable[str], row: int | None = None) -> dict[str, torch.Tensor]:
        """Return tensors of a file, or one row of each."""
        try:
            with safe_open(file, "pt") as content:
                return {
                    name: content.get_tensor(name) if row is None else content.get_slice(name)[row] for name in names
                }
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file} cannot be read ({error}); delete it, and run medalign targets again to replace it"
            ) from error


class CacheWriter:
    """Adds the targets of images. Call `flush` at the end.

    Args:
        folder: the cache.
        rank: this rank; files that an earlier start of the same rank left incomplete are deleted.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.count = 0
        self._stored = CacheFiles(folder)
        self._new: set[bytes] = set()
        self._rows: list[dict[str, torch.Tensor]] = []
        self._bytes = 0
        for file in folder.glob(f"part-{rank:05d}-*{_PARTIAL}"):
            file.unlink()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._new or digest in self._stored

    def add(self, digests: Sequence[bytes], seen: Mapping[str, torch.Tensor]) -> None:
        """Add what a teacher saw in images; those that are in the cache already must have been left out.

        Args:
            digests: the hash of each image's canvas.
            seen: tensors [I, ...] by name, of all images in the same order.

        Raises:
            ConfigError: a feature is beyond the range of float16.
        """
        stored = {name: tensor.to("cpu", torch.float32) for name, tensor in seen.items()}
        stored[FEATURES] = stored[FEATURES].half()
        if not stored[FEATURES].isfinite().all():
            raise ConfigError(
                f"a feature of the teacher is not within the range of float16 (65504), in which teacher.cache "
                f"{self.folder} holds them; train without teacher.cache, or set teacher.features to after_norm"
            )
        stored[DIGESTS] = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
        self._rows.append(stored)
        self._new.update(digests)
        self.count += len(digests)
        self._bytes += sum(tensor.nbytes for tensor in stored.values())
        if self._bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been added into a file of its own."""
        if not self._rows:
            return
        name = f"part-{self.rank:05d}-{uuid.uuid4().hex}"
        scratch = self.folder / f"{name}{_PARTIAL}"
        save_file({key: torch.cat([row[key] for row in self._rows]) for key in self._rows[0]}, scratch)
        scratch.replace(self.folder / f"{name}.safetensors")
        self._rows, self._bytes = [], 0

    def mark_covered(self, fingerprint: str, world: int) -> None:
        """Record that this rank's part of a folder of shards, one of `world` parts, is in the cache."""
        self.flush()
        name = f"covered-{_short_hash(fingerprint)}-{self.rank}-of-{world}.json"
        write_text(self.folder / name, json.dumps({"data": fingerprint}) + "\n")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
