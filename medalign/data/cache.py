"""Byte ranges kept in a local folder, bounded in bytes, shared by the processes of a node."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK, _TOTAL = ".lock", ".bytes"
_LOWER = 0.9  # share of the bound that is left after making room


class RangeCache:
    """Least recently used ranges go first. The files never hold more than `bound` bytes together.

    A range that is being read while it is removed is simply read from afar again. What the disk refuses to hold is not
    kept.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder = Path(folder) / "ranges"
        self._bound = bound
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> bytes | None:
        """The bytes kept under this name, or None."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep the bytes, unless they alone break the bound."""
        path = self._path(name)
        if len(data) > self._bound or path.exists():
            return
        with self._locked():
            total = self._total()
            if total + len(data) > self._bound:
                total = self._make_room(self._bound - len(data))
            partial = path.with_suffix(".partial")
            try:
                partial.write_bytes(data)
                partial.replace(path)
            except OSError:
                partial.unlink(missing_ok=True)
                return
            (self._folder / _TOTAL).write_text(str(total + len(data)))

    def _make_room(self, most: int) -> int:
        """Remove the oldest until `most`, and some more, is left. Returns the bytes left."""
        files = sorted(
            ((stat.st_mtime_ns, stat.st_size, path) for path in self._ranges() for stat in [path.stat()]),
            key=lambda entry: entry[0],
        )
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= min(most, int(self._bound * _LOWER)):
                break
            path.unlink(missing_ok=True)
            total -= size
        (self._folder / _TOTAL).write_text(str(total))
        return total

    def _total(self) -> int:
        try:
            return int((self._folder / _TOTAL).read_text())
        except (OSError, ValueError):
            return sum(path.stat().st_size for path in self._ranges())

    def _ranges(self) -> Iterator[Path]:
        return self._folder.glob("*.range")

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.range"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
