"""A lock that lets only one training use a run's folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from medalign import distributed
from medalign.errors import ConfigError, RunInUse
from medalign.file_lock import lock
from medalign.run_folder import RunFolder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of the run's folder on rank 0 inside the context. Every rank must enter it.

    The folder is created if necessary. The operating system releases the lock when the process ends for any reason.

    Raises:
        RunInUse: another training holds the lock.
        ConfigError: the folder cannot be used.
    """
    with ExitStack() as stack:
        with distributed.raise_on_all_ranks():
            if distributed.is_main():
                _acquire(folder, stack)
        yield


def _acquire(folder: Path, stack: ExitStack) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir {folder} is a file; choose a folder with --run.dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(RunFolder(folder).lock.open("w"))
    except OSError as error:
        raise ConfigError(
            f"run.dir {folder} cannot be written ({error.strerror or error}); choose another folder with --run.dir"
        ) from error
    if not lock(file, str(folder)):
        raise RunInUse(
            f"another training is running in {folder}; wait until it ends, or choose another folder with --run.dir"
        )
