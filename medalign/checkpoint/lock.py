"""A run's folder belongs to one training at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from medalign import distributed
from medalign.errors import ConfigError
from medalign.run_folder import RunFolder

log = logging.getLogger("medalign")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, rank 0 holds the lock of the run's folder, which is made if need be. Every rank must enter.

    The lock ends with the process, however that ends. Raises ConfigError if another training holds it, or the folder
    cannot be used.
    """
    with ExitStack() as stack:
        with distributed.raise_on_all_ranks():
            if distributed.is_main():
                _take(folder, stack)
        yield


def _take(folder: Path, stack: ExitStack) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir {folder} is a file; name a folder with --run.dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(RunFolder(folder).lock.open("w"))
    except OSError as error:
        raise ConfigError(
            f"run.dir {folder} cannot be written ({error.strerror or error}); name another folder with --run.dir"
        ) from error
    try:
        # lockf, not flock: forked children, which the loader's workers are, would hold on to the latter for a while
        # after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(
                f"another training is under way in {folder}; wait for its end, or name another folder with --run.dir"
            ) from error
        log.warning(
            "%s cannot be locked (%s): see to it yourself that no second training starts in it",
            folder,
            error.strerror or error,
        )
