"""Read byte ranges of shards from local files, and from http(s), s3 or any other address that fsspec supports.

Failed reads are retried with exponential backoff: the connection was dropped, the server is busy, or the file is
temporarily missing. An error is raised after the last retry. An address is never passed to a shell.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from medalign.config.schema import DataConfig
from medalign.data.storage.cache import RangeCache
from medalign.data.storage.filesystems import failures, open_system, reason_of, remedy_of
from medalign.errors import ConfigError, DataError

Result = TypeVar("Result")
log = logging.getLogger("medalign")

_OPEN_FILES = 64  # shards kept open per process
_MAX_PAUSE = 10.0  # seconds


class ShortReadError(OSError):
    """A read returned fewer bytes than requested."""


@dataclass(frozen=True)
class StorageOptions:
    """Options for reading shards."""

    retries: int = 5  # after the first attempt fails
    pause: float = 0.2  # seconds before the first retry; doubles with each retry
    read_ahead: int = 16  # concurrent remote reads
    cache: Path | None = None  # folder for byte ranges read from remote storage
    cache_bytes: int = 0  # maximum size of the cache

    @classmethod
    def from_settings(cls, data: DataConfig) -> StorageOptions:
        """The options of a run."""
        cache = Path(data.cache_dir) if data.cache_dir else None
        return cls(retries=data.retries, cache=cache, cache_bytes=int(data.cache_gib * 2**30))


class Storage(Protocol):
    """Source of the bytes of shards. Can be pickled and survives a fork."""

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """Read `length` bytes of a file.

        Args:
            place: path or address of the file.
            offset: position of the first byte.
            length: number of bytes.
            bypass_cache: read from the source even if the range is cached.

        Raises:
            DataError: the last attempt failed. The message names the file.
        """
        ...

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Announce ranges (place, offset, length) that will be read soon."""
        ...


def is_remote(place: str | Path) -> bool:
    """Return whether the place is an address rather than a local path. Raises ConfigError for `pipe:`."""
    text = str(place)
    if text.startswith("pipe:"):
        raise ConfigError(f"{text!r}: shards are not read through a shell; give the address itself (s3://, https://)")
    return "://" in text


def storage_of(place: str | Path, options: StorageOptions) -> Storage:
    """Return the storage that reads this place."""
    return RemoteStorage(options) if is_remote(place) else LocalStorage(options)


class LocalStorage:
    """Positioned reads from local files."""

    def __init__(self, options: StorageOptions) -> None:
        self._options = options
        self._files: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """See `Storage.read`."""
        return retry(lambda: self._read_once(place, offset, length), f"shard {place}", self._options)

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Do nothing: the operating system reads ahead."""

    def _read_once(self, place: str, offset: int, length: int) -> bytes:
        file = self._files.pop(place, None) or open(place, "rb", buffering=0)  # noqa: SIM115
        data = os.pread(file.fileno(), length, offset)
        if len(data) != length:
            file.close()  # so that the next attempt opens the current file
            raise ShortReadError(f"it ends before byte {offset + length}; it was changed during the run")
        self._files[place] = file  # the most recently used comes last
        if len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return data


class RemoteStorage:
    """Byte ranges over the network, read concurrently and optionally kept in a local cache."""

    def __init__(self, options: StorageOptions) -> None:
        self._options = options
        self._cache = RangeCache(options.cache, options.cache_bytes) if options.cache and options.cache_bytes else None
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._systems: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[tuple[str, int, int], Future[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_options": self._options, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """See `Storage.read`."""
        self._reset_after_fork()
        pending = self._pending.pop((place, offset, length), None)
        return pending.result() if pending and not bypass_cache else self._fetch(place, offset, length, bypass_cache)

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Start to read. Ranges that are never requested are dropped when newer ones arrive."""
        self._reset_after_fork()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._options.read_ahead, thread_name_prefix="medalign-read-ahead")
        wanted = set(ranges)
        for old in [known for known in self._pending if known not in wanted][: -4 * len(ranges) or None]:
            self._pending.pop(old).cancel()
        for span in ranges:
            if span not in self._pending:
                self._pending[span] = self._pool.submit(self._fetch, *span)

    def copy(self, place: str, target: Path) -> None:
        """Stream a file to a local one, which appears atomically.

        Raises:
            DataError: the file cannot be read.
            OSError: the local file cannot be written.
        """
        self._reset_after_fork()
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")  # unique across nodes
        try:
            retry(lambda: self._system(place).get_file(place, str(partial)), place, self._options)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def size(self, place: str) -> int | None:
        """Return the size of a file in bytes, or None if the server does not report it. Raises DataError."""
        self._reset_after_fork()
        size = retry(lambda: self._system(place).info(place), place, self._options)["size"]
        return None if size is None else int(size)

    def beginning(self, place: str, length: int) -> bytes:
        """Read the first `length` bytes of a file, or fewer if it is shorter, without the cache. Raises DataError."""
        self._reset_after_fork()
        data: bytes = retry(lambda: self._system(place).cat_file(place, start=0, end=length), place, self._options)
        return data[:length]

    def _fetch(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        name = f"{place}:{offset}:{length}"
        data: bytes | None = self._cache.get(name) if self._cache and not bypass_cache else None
        if data is None or len(data) != length:
            data = retry(lambda: self._read_once(place, offset, length), f"shard {place}", self._options)
            if self._cache:
                self._cache.put(name, data)
        return data

    def _read_once(self, place: str, offset: int, length: int) -> bytes:
        data: bytes = self._system(place).cat_file(place, start=offset, end=offset + length)
        if len(data) > length:  # the server does not support ranges and sent the complete file
            data = data[offset : offset + length]
        if len(data) != length:
            raise ShortReadError(f"it returned {len(data)} of {length} bytes from byte {offset} on")
        return data

    def _system(self, place: str) -> Any:
        scheme = place.partition("://")[0]
        with self._opening:  # the first prefetches start concurrently and share one client
            if scheme not in self._systems:
                self._systems[scheme] = open_system(place, self._options.read_ahead)
        return self._systems[scheme]

    def _reset_after_fork(self) -> None:
        if self._process != os.getpid():
            self._reset()


def retry(read: Callable[[], Result], name: str, options: StorageOptions) -> Result:
    """Call `read`, and retry with exponential backoff if it fails.

    Raises:
        DataError: the last attempt failed. The message contains `name`.
    """
    for attempt in range(options.retries + 1):
        try:
            return read()
        except failures() as error:
            reason = reason_of(error, name)
            if attempt == options.retries:
                raise DataError(
                    f"{name} cannot be read after {attempt + 1} tries: {reason}; {remedy_of(error)}"
                ) from error
            if attempt == 0:
                log.warning("%s cannot be read: %s; retrying up to %d times", name, reason, options.retries)
            time.sleep(min(options.pause * 2**attempt, _MAX_PAUSE))
    raise AssertionError("unreachable: the last attempt returns or raises")
