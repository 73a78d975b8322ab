"""The answers of an evaluation in progress on disk, and what an interrupted one leaves to the next call.

.predictions.jsonl.rank-0       one line per batch that rank 0 has answered
.predictions.jsonl.settings     the settings that the answers were generated with
.predictions.jsonl.lock         held by rank 0

A batch is the unit: its answers come at once, and only a whole batch is repeated bit by bit. The next call may have
another number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign import distributed
from medalign.errors import DataError
from medalign.evaluation.batching import Place
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.predictions import format_prediction, prediction_of
from medalign.file_lock import only_writer
from medalign.observability.files import write_text

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Entry:
    """An answered batch.

    Attributes:
        batch: its number.
        rows: each prediction with its place.
        unreadable: number of samples that have none.
    """

    batch: int
    rows: list[tuple[Place, Prediction]]
    unreadable: int

    @classmethod
    def of(cls, batch: int, places: Sequence[Place], predicted: PredictionBatch) -> Entry:
        """Return the entry of a batch with these places."""
        for place, row in predicted.rows:
            row.folder = places[place].folder
        return cls(batch, [(places[i], row) for i, row in predicted.rows], len(predicted.unreadable))

    @property
    def samples(self) -> int:
        """Number of samples of the batch."""
        return len(self.rows) + self.unreadable


class Journal:
    """The files of an evaluation in progress.

    Args:
        path: predictions.jsonl, which is written at the end.
        settings: all that determines the predictions, as JSON values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._settings_path = path.with_name(f".{path.name}.settings")
        self._lock = ExitStack()

    def resume(self) -> list[Entry]:
        """Return the batches that an interrupted evaluation of the same settings has answered. Only rank 0 calls it.

        What it leaves on disk is one whole line for each of them. No other evaluation can use the files until this one
        ends. Raises ConfigError if one does.
        """
        self._lock.enter_context(only_writer(self.path, "--name or --output"))
        files = self._files()
        if files and (different := self._differences()):
            log.warning("an interrupted evaluation differs in %s; starting again", ", ".join(different))
            for path in files:
                path.unlink()
        entries = self.entries()
        write_text(self._settings_path, json.dumps(self._settings) + "\n")
        if entries:
            write_text(self._file(0), "".join(map(_format, entries)))
        for path in self._files():
            if path != self._file(0) or not entries:
                path.unlink()
        return entries

    @contextmanager
    def writer(self) -> Iterator[Callable[[int, Sequence[Place], PredictionBatch], None]]:
        """Yield a function that appends a batch to the file of this rank."""
        with self._file(distributed.rank()).open("a", encoding="utf-8") as file:

            def append(batch: int, places: Sequence[Place], predicted: PredictionBatch) -> None:
                file.write(_format(Entry.of(batch, places, predicted)))
                file.flush()

            yield append
            os.fsync(file.fileno())

    def report(self) -> None:
        """Log where the answers of an evaluation that ended early are, on rank 0. It no longer uses them."""
        if distributed.is_main() and any(path.stat().st_size for path in self._files()):
            log.error(
                "it ended early; the answers so far are in %s, and the same command resumes it",
                self.path.with_name(f".{self.path.name}.rank-*"),
            )
        self._lock.close()

    def entries(self) -> list[Entry]:
        """Return the batches on disk, in order. A line whose end was not written is left out."""
        found: dict[int, Entry] = {}
        for path in self._files():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
                entry = _parse(line, f"{path}, line {number}")
                found.setdefault(entry.batch, entry)
        return [found[batch] for batch in sorted(found)]

    def finish(self) -> None:
        """Remove the files. The predictions must be written."""
        for path in [*self._files(), self._settings_path]:
            path.unlink(missing_ok=True)
        self._lock.close()

    def _file(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.rank-{rank}")

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.name}.rank-*"))

    def _differences(self) -> list[str]:
        """Return the names of the settings in which the evaluation on disk differs."""
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            return ["settings that are not recorded"]
        return [name for name in {**before, **self._settings} if before.get(name) != self._settings.get(name)]


def _format(entry: Entry) -> str:
    rows = ", ".join(f"[{place.folder}, {place.sample}, {format_prediction(row).strip()}]" for place, row in entry.rows)
    return f'{{"batch": {entry.batch}, "unreadable": {entry.unreadable}, "rows": [{rows}]}}\n'


def _parse(line: str, where: str) -> Entry:
    try:
        values = json.loads(line)
        rows = [(Place(folder, sample), prediction_of(row, where)) for folder, sample, row in values["rows"]]
        return Entry(values["batch"], rows, values["unreadable"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where} is damaged ({error}); remove the file, and its batches are answered again") from error
