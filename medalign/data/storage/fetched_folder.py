"""A local copy of the small files of a remote folder, such as its index."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from medalign.data.storage.byte_ranges import RemoteStorage, StorageOptions
from medalign.data.storage.cache import file_lock
from medalign.errors import DataError

_BEGINNING = 4096  # bytes at the start of a remote file that are compared with the local copy


def fetched_folder(address: str, names: tuple[str, ...], options: StorageOptions) -> Path:
    """Copy small files of a remote folder to a local one, unless it holds them with the same size and beginning.

    Args:
        address: the remote folder.
        names: names of the files.
        options: how the files are read; the local folder is below `options.cache` if it is set.

    Returns:
        The local folder.

    Raises:
        DataError: a file cannot be read, or the local folder cannot be written.
    """
    home = options.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medalign"
    folder = home / "index" / hashlib.sha256(address.encode()).hexdigest()[:24]
    remote = RemoteStorage(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder):
            for name in names:
                place, target = f"{address.rstrip('/')}/{name}", folder / name
                if not target.is_file() or not _is_copy(target, remote, place):
                    remote.copy(place, target)
    except OSError as error:
        raise DataError(
            f"the index of {address} cannot be stored in {folder}: {error.strerror or error}; "
            "set data.cache_dir or XDG_CACHE_HOME to a folder with free space"
        ) from error
    return folder


def _is_copy(local: Path, remote: RemoteStorage, place: str) -> bool:
    """Compare size and first bytes; an index has the checksum of its remainder in its first line."""
    if local.stat().st_size != remote.size(place):
        return False
    with local.open("rb") as file:
        beginning = file.read(_BEGINNING)
    return remote.beginning(place, len(beginning)) == beginning
