"""Bytes of shards by position: from local files, and from http(s), s3 or any other address that fsspec knows.

What fails is tried again with growing pauses: a dropped connection, a server that is busy, a file that is gone for a
moment. Then it is reported. No address is ever handed to a shell.
"""

from __future__ import annotations

import hashlib
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
from medalign.data.storage.cache import RangeCache, file_lock
from medalign.data.storage.filesystems import failures, open_system, reason_of, remedy_of
from medalign.errors import ConfigError, DataError

Result = TypeVar("Result")
log = logging.getLogger("medalign")

_OPEN_FILES = 64  # shards kept open by one process
_LONGEST_PAUSE = 10.0  # seconds
_BEGINNING = 4096  # bytes of a remote file that are compared with its copy


class ShortReadError(OSError):
    """Fewer bytes than asked for."""


@dataclass(frozen=True)
class StorageOptions:
    """How shards are reached."""

    retries: int = 5  # tries after the first that failed
    pause: float = 0.2  # seconds before the second try; doubles with each
    read_ahead: int = 16  # remote reads under way at a time
    cache: Path | None = None  # folder for ranges read from afar
    cache_bytes: int = 0  # most bytes in it

    @classmethod
    def from_settings(cls, data: DataConfig) -> StorageOptions:
        """The options of a run."""
        cache = Path(data.cache_dir) if data.cache_dir else None
        return cls(retries=data.retries, cache=cache, cache_bytes=int(data.cache_gib * 2**30))


class Storage(Protocol):
    """Where the bytes of shards come from. Safe to fork and to pickle."""

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """`length` bytes of the file from `offset` on, past any cache if `anew`.

        Raises DataError naming the file after the last try.
        """
        ...

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """These ranges (place, offset, length) will be read soon."""
        ...


def is_remote(place: str | Path) -> bool:
    """Whether the place is an address rather than a local path. Raises ConfigError for `pipe:`."""
    text = str(place)
    if text.startswith("pipe:"):
        raise ConfigError(f"{text!r}: shards are not read through a shell; give the address itself (s3://, https://)")
    return "://" in text


def storage_of(place: str | Path, access: StorageOptions) -> Storage:
    """The storage that reads this place."""
    return RemoteStorage(access) if is_remote(place) else LocalStorage(access)


class LocalStorage:
    """Positioned reads from local files."""

    def __init__(self, access: StorageOptions) -> None:
        self._access = access
        self._files: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """As `Storage.read`."""
        return retry(lambda: self._once(place, offset, length), f"shard {place}", self._access)

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Nothing: the operating system reads ahead."""

    def _once(self, place: str, offset: int, length: int) -> bytes:
        file = self._files.pop(place, None) or open(place, "rb", buffering=0)  # noqa: SIM115
        data = os.pread(file.fileno(), length, offset)
        if len(data) != length:
            file.close()  # the next try opens what is there then
            raise ShortReadError(f"it ends before byte {offset + length}; it was changed since the start")
        self._files[place] = file  # the most recently used comes last
        if len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return data


class RemoteStorage:
    """Byte ranges over the network, several at a time, kept in a local cache if there is one."""

    def __init__(self, access: StorageOptions) -> None:
        self._access = access
        self._cache = RangeCache(access.cache, access.cache_bytes) if access.cache and access.cache_bytes else None
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._systems: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[tuple[str, int, int], Future[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_access": self._access, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        """As `Storage.read`."""
        self._own_process()
        pending = self._pending.pop((place, offset, length), None)
        return pending.result() if pending and not bypass_cache else self._fetch(place, offset, length, bypass_cache)

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Begin to read; what is never asked for is dropped when newer ranges come."""
        self._own_process()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._access.read_ahead, thread_name_prefix="medalign-read-ahead")
        wanted = set(ranges)
        for old in [known for known in self._pending if known not in wanted][: -4 * len(ranges) or None]:
            self._pending.pop(old).cancel()
        for one in ranges:
            if one not in self._pending:
                self._pending[one] = self._pool.submit(self._fetch, *one)

    def copy(self, place: str, target: Path) -> None:
        """The file, piece by piece, to a local one, whole or not at all. Raises DataError, or the disk's OSError."""
        self._own_process()
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")  # of whatever node
        try:
            retry(lambda: self._system(place).get_file(place, str(partial)), place, self._access)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def size(self, place: str) -> int | None:
        """Bytes of a file, None where the server does not say. Raises DataError."""
        self._own_process()
        size = retry(lambda: self._system(place).info(place), place, self._access)["size"]
        return None if size is None else int(size)

    def beginning(self, place: str, length: int) -> bytes:
        """The first bytes of a file as it is now, past any cache; fewer where it is shorter. Raises DataError."""
        self._own_process()
        return retry(lambda: self._system(place).cat_file(place, start=0, end=length), place, self._access)[:length]

    def _fetch(self, place: str, offset: int, length: int, bypass_cache: bool = False) -> bytes:
        name = f"{place}:{offset}:{length}"
        data = self._cache.get(name) if self._cache and not bypass_cache else None
        if data is None or len(data) != length:
            data = retry(lambda: self._once(place, offset, length), f"shard {place}", self._access)
            if self._cache:
                self._cache.put(name, data)
        return data

    def _once(self, place: str, offset: int, length: int) -> bytes:
        data = self._system(place).cat_file(place, start=offset, end=offset + length)
        if len(data) > length:  # the server does not know ranges and sent the whole file
            data = data[offset : offset + length]
        if len(data) != length:
            raise ShortReadError(f"it gave {len(data)} of {length} bytes from byte {offset} on")
        return data

    def _system(self, place: str) -> Any:
        scheme = place.partition("://")[0]
        with self._opening:  # the first reads ahead come all at once, and one client is enough for them
            if scheme not in self._systems:
                self._systems[scheme] = open_system(place, self._access.read_ahead)
        return self._systems[scheme]

    def _own_process(self) -> None:
        if self._process != os.getpid():
            self._forget()


def retry(read: Callable[[], Result], name: str, access: StorageOptions) -> Result:
    """`read()`, again with growing pauses where it fails. Raises DataError naming `name` after the last try."""
    for attempt in range(access.retries + 1):
        try:
            return read()
        except failures() as error:
            reason = reason_of(error, name)
            if attempt == access.retries:
                raise DataError(
                    f"{name} cannot be read after {attempt + 1} tries: {reason}; {remedy_of(error)}"
                ) from error
            if attempt == 0:
                log.warning("%s cannot be read: %s; trying %d more times", name, reason, access.retries)
            time.sleep(min(access.pause * 2**attempt, _LONGEST_PAUSE))
    raise AssertionError("unreachable: the last try returns or raises")


def fetched_folder(address: str, names: tuple[str, ...], access: StorageOptions) -> Path:
    """A local folder with these small files of a remote one, fetched where absent, or other in size or beginning."""
    home = access.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medalign"
    folder = home / "index" / hashlib.sha256(address.encode()).hexdigest()[:24]
    remote = RemoteStorage(access)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder):
            for name in names:
                place, target = f"{address.rstrip('/')}/{name}", folder / name
                if not target.is_file() or not _is_copy(target, remote, place):
                    remote.copy(place, target)
    except OSError as error:
        raise DataError(
            f"the index of {address} cannot be kept in {folder}: {error.strerror or error}; "
            "name a folder with room by data.cache_dir or XDG_CACHE_HOME"
        ) from error
    return folder


def _is_copy(local: Path, remote: RemoteStorage, place: str) -> bool:
    """By size and first bytes, where an index carries the checksum of the rest."""
    if local.stat().st_size != remote.size(place):
        return False
    with local.open("rb") as file:
        beginning = file.read(_BEGINNING)
    return remote.beginning(place, len(beginning)) == beginning
