"""Why each rank of a start ended, in the run's folder, for what restarts the run and for whoever looks for the reason.

A launcher reports one status for all ranks, often that of a rank which it has killed itself. A rank that is killed
leaves no record.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from medalign import distributed
from medalign.distributed import log
from medalign.errors import RunInUse, exit_status
from medalign.file_lock import is_locked
from medalign.run_folder import RunFolder

_LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class ExitRecord:
    """The end of one rank.

    Attributes:
        rank: its number.
        world: number of ranks.
        time: seconds since 1970, by the clock of its node.
        status: exit status.
        reason: the message of the error; empty after success.
    """

    rank: int
    world: int
    time: float
    status: int
    reason: str


class Recorder:
    """Writes and removes the record of this rank, unless the folder belongs to another training at this moment.

    A start may fail before it holds the run's lock, as with a port that is in use. Its reason belongs into the folder,
    but not if a training is running there, whose records it would replace.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._owns = False

    def own(self) -> None:
        """Write in any case from now on: this start holds the run's lock. Every rank calls it."""
        self._owns = True
        self.remove()

    def remove(self) -> None:
        """Remove the record of an earlier start."""
        if self._may_change():
            with suppress(OSError):  # a folder that cannot be written is reported when it is locked
                self._folder.exit_record(distributed.rank()).unlink(missing_ok=True)

    def write(self, status: int, reason: str) -> None:
        """Record the end of this rank; a warning if that is not possible."""
        if self._may_change():
            _write(self._folder, status, reason)

    def _may_change(self) -> bool:
        return self._owns or not is_locked(self._folder.lock)


@contextmanager
def recorded(folder: RunFolder) -> Iterator[Recorder]:
    """Record how the context ends on this rank. A start that another training in the folder refuses leaves nothing."""
    recorder = Recorder(folder)
    recorder.remove()
    try:
        yield recorder
    except RunInUse:
        raise
    except BaseException as error:
        status = exit_status(error)
        recorder.write(status, str(error) if status != 1 else f"{type(error).__name__}: {error}")
        raise
    recorder.write(0, "")


def _write(folder: RunFolder, status: int, reason: str) -> None:
    line = " ".join(reason.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 4] + " ..."
    record = ExitRecord(distributed.rank(), distributed.world_size(), time.time(), status, line)
    path = folder.exit_record(record.rank)
    scratch = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or error)


def read(folder: RunFolder) -> list[ExitRecord]:
    """Return the records of the last start, the earliest end first. One that is damaged counts as none."""
    found = []
    for path in folder.exit_records():
        try:
            found.append(ExitRecord(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            log.warning("%s is not a record of a rank's end and is left out: %s", path, error)
    return sorted(found, key=lambda record: record.time)


def clear(folder: RunFolder) -> None:
    """Remove the records of earlier starts."""
    for path in folder.exit_records():
        with suppress(OSError):  # a folder that cannot be written is reported when it is locked
            path.unlink()
