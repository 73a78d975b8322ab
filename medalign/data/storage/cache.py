"""What the processes of a node share on its disk: byte ranges in a bounded folder, and turns at making a file."""

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
_LOWER = 0.9  # share of the bound that is left after making room


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Inside is one process at a time for this folder; where the file system knows no locks, any number."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # to close it is not enough: a child forked meanwhile has it open too
        os.close(handle)


class RangeCache:
    """Least recently used ranges go first. The files never hold more than `bound` bytes together.

    A range that is being read while it is removed is simply read from afar again. What the disk refuses to hold is not
    kept, and the log says so once.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder = Path(folder) / "ranges"
        self._bound = bound
        self._refused = False

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
        """Keep the bytes, in place of others under this name, unless they alone break the bound."""
        if len(data) > self._bound:
            return
        try:
            with self._locked():
                self._keep(self._path(name), data)
        except OSError as error:
            if not self._refused:
                log.warning("nothing more is kept in %s for now (%s); it is read from afar", self._folder, error)
            self._refused = True

    def _keep(self, path: Path, data: bytes) -> None:
        total = self._total()
        if total + len(data) > self._bound:
            total = self._make_room(self._bound - len(data))
        # Counted before it is there, and written under one name: whoever is killed in between leaves too high a count,
        # and a piece that the next one overwrites. Where room is made, all is counted anew.
        (self._folder / _TOTAL).write_text(str(total + len(data)))
        partial = self._folder / _PARTIAL
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

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
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # to close it is not enough: a child forked meanwhile has it open too
