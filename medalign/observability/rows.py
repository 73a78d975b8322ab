"""Metrics as rows of a JSONL file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medalign.distributed import log
from medalign.errors import DataError
from medalign.observability.files import write_text
from medalign.observability.sinks import to_python_numbers


class JsonlSink:
    """Writes one JSON object per row, each at once. A value that is not finite is written as null.

    Besides the metrics, a row contains `step` and `time`, the time of logging (UTC, ISO 8601, milliseconds). Rows that
    cannot be written, such as on a full disk, are kept in memory and written, in order, once it is possible.

    Args:
        path: the file.
        resumed_step: step from which the run resumes. Later rows are removed from the file, because the run writes
            them again. Incomplete lines at the end, left by a kill or a power failure, are removed too.
        clock: returns the current time.

    Raises:
        DataError: another line of the file is not a row.
    """

    def __init__(
        self, path: Path, *, resumed_step: int = 0, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path, self._clock = path, clock
        kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= resumed_step] if path.exists() else []
        write_text(path, "".join(line + "\n" for line in kept))
        # Without a buffer, the number of bytes that reached the file is known after an error.
        self._file = path.open("ab", buffering=0)
        self._unwritten = bytearray()
        self._failing = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        now = self._clock().isoformat(timespec="milliseconds")
        row = {k: v if math.isfinite(v) else None for k, v in to_python_numbers(values).items()}
        self._unwritten += (json.dumps({"step": step, "time": now, **row}) + "\n").encode()
        self._write()

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        self._write()
        if self._unwritten:
            log.warning("%s: %d rows are lost", self._path, self._unwritten.count(b"\n"))
        self._file.close()

    def _write(self) -> None:
        rows = self._unwritten.count(b"\n")
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written (%s): rows are kept in memory until it can",
                    self._path,
                    error.strerror or error,
                )
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again: %d rows that were kept in memory are in it", self._path, rows)
        self._failing = False


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows that a JsonlSink wrote, except incomplete lines at the end.

    A kill leaves the start of a row there, a power failure also zeros or parts of earlier rows.

    Raises:
        DataError: a line before the last row is not a row.
    """
    lines = path.read_bytes().splitlines()
    parsed = [_parse(line) for line in lines]
    while parsed and isinstance(parsed[-1], str):
        parsed.pop()
    if len(parsed) < len(lines):
        size = sum(map(len, lines[len(parsed) :]))
        log.info("%s: %d bytes at its end are not a complete row and are left out", path, size)
    rows = []
    for number, row in enumerate(parsed, start=1):
        if isinstance(row, str):
            raise DataError(f"{path}, line {number}: {row}; remove the line, or the file")
        rows.append(row)
    return rows


def _parse(line: bytes) -> dict[str, Any] | str:
    """Return a row, or why the line is not one."""
    try:
        row = json.loads(line)
    except ValueError as error:  # includes errors of UTF-8
        return str(error)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return "a row is an object with an integer 'step'"
    return row
