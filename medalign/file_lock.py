"""A lock on a file, which the operating system releases when the process ends for any reason."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from medalign.errors import ConfigError

log = logging.getLogger("medalign")


def lock(file: IO[str], what: str) -> bool:
    """Lock an open file until it is closed. Returns False if another process has locked it.

    A file system without locks is accepted, with a warning.

    Args:
        file: open for writing.
        what: what the lock protects, for the warning.
    """
    try:
        # lockf instead of flock: forked children, such as the workers of the loader, would keep a flock for a while
        # after the process is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        log.warning(
            "%s cannot be locked (%s): make sure that no second process writes it", what, error.strerror or error
        )
    return True


def is_locked(path: Path) -> bool:
    """Return whether another process has locked a file. A file system without locks has none.

    Do not call it while this process has locked the file: closing a file gives up all locks that the process has on it.
    """
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock
    try:
        with path.open("rb") as file:
            kind: int = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, query))[0]
    except OSError:
        return False
    return kind != fcntl.F_UNLCK


@contextmanager
def only_writer(path: Path, remedy: str) -> Iterator[None]:
    """Let no other process that asks for it write a file inside the context.

    Args:
        path: the file. A hidden file beside it is locked.
        remedy: what to choose instead, for the message.

    Raises:
        ConfigError: another process writes the file.
    """
    held = path.with_name(f".{path.name}.lock")
    file = _take(held)
    if file is None:
        raise ConfigError(f"another process is writing {path}; wait until it ends, or choose another {remedy}")
    try:
        yield
    finally:
        held.unlink(missing_ok=True)
        file.close()


def _take(path: Path) -> IO[str] | None:
    """Create a file and lock it; None if another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("w", encoding="utf-8")
        if not lock(file, str(path)):
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # it was removed after it had been opened: the process that held it has ended
