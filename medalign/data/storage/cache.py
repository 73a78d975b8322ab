"""State that the processes of a node share on disk: a bounded cache of byte ranges, and a file lock."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("medalign")

_LOCK, _TOTAL, _PARTIAL = ".lock", ".bytes", ".partial"
_KEEP_FRACTION = 0.9  # of the size limit, kept when old ranges are evicted


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Lock a folder, so that one process at a time runs the block; not where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a forked child may hold the handle, too
        os.close(handle)


class RangeCache:
    """Least recently used cache of byte ranges. Its files never take more than `max_bytes` in total.

    A range that is evicted while it is being read is fetched from the remote storage. If the disk is full, ranges are
    not cached, and a warning is logged once.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = Path(folder) / "ranges"
        self._max_bytes = max_bytes
        self._refused = False

    def get(self, name: str) -> bytes | None:
        """Return the bytes cached under this name, or None."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Cache the bytes and replace any others under this name. Data larger than the cache is not cached."""
        if len(data) > self._max_bytes:
            return
        try:
            with self._locked():
                self._keep(self._path(name), data)
        except OSError as error:
            if not self._refused:
                log.warning("caching in %s is suspended (%s); reading from remote storage", self._folder, error)
            self._refused = True

    def _keep(self, path: Path, data: bytes) -> None:
        total = self._total()
        if total + len(data) > self._max_bytes:
            total = self._make_room(self._max_bytes - len(data))
        # The total is updated before the data is written, and the partial file always has the same name. A process
        # that is killed in between leaves a total that is too high, and a partial file that the next process
        # overwrites. Eviction recomputes the total.
        (self._folder / _TOTAL).write_text(str(total + len(data)))
        partial = self._folder / _PARTIAL
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, max_left: int) -> int:
        """Evict the oldest ranges until at most `max_left` bytes remain, with some margin. Returns the bytes left."""
        files = sorted(
            ((stat.st_mtime_ns, stat.st_size, path) for path in self._ranges() for stat in [path.stat()]),
            key=lambda entry: entry[0],
        )
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= min(max_left, int(self._max_bytes * _KEEP_FRACTION)):
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
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a forked child may hold the handle, too
