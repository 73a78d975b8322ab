"""An evaluation in progress: its rows on disk, and what an interrupted one leaves to the next call.

.predictions.jsonl.unfinished   the rows so far
.predictions.jsonl.settings     the settings that they were generated with

An evaluation continues after the last whole batch, so that the remaining batches hold the same samples, and the result
is that of an evaluation that was not interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.shards.index import ShardIndex
from medalign.evaluation.metrics import Prediction, append_predictions, read_predictions, unfinished
from medalign.evaluation.metrics.predictions import format_prediction
from medalign.observability.files import write_text

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Done:
    """What an interrupted evaluation has done.

    Attributes:
        rows: its predictions, in whole batches.
        starts: for each shard folder, the index of the first sample that remains.
    """

    rows: list[Prediction]
    starts: list[int]

    @property
    def unreadable(self) -> int:
        """Number of samples before `starts` that have no prediction."""
        return sum(self.starts) - len(self.rows)


class UnfinishedEvaluation:
    """The files of an evaluation in progress.

    Args:
        path: predictions.jsonl, which is written at the end.
        settings: all that determines the predictions, as JSON values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._settings_path = path.with_name(f".{path.name}.settings")

    def resume(self, indexes: Sequence[ShardIndex], planned: Sequence[int], batch_size: int) -> Done:
        """Return what an interrupted evaluation of the same settings has done, and keep only that on disk.

        Args:
            indexes: the shard folders.
            planned: how many samples of each folder, from its first one, are evaluated.
            batch_size: questions per batch.
        """
        part = unfinished(self.path)
        rows: list[Prediction] = []
        if part.is_file():
            if different := self._differences():
                log.warning("an interrupted evaluation differs in %s; starting again", ", ".join(different))
            else:
                _drop_partial_line(part)
                rows = read_predictions(part)
        done = _whole_batches(rows, indexes, planned, batch_size)
        write_text(self._settings_path, json.dumps(self._settings) + "\n")
        part.unlink(missing_ok=True)
        if done.rows:
            write_text(part, "".join(map(format_prediction, done.rows)))
            log.info("resuming an interrupted evaluation after %d of %d samples", sum(done.starts), sum(planned))
        return done

    def append(self, rows: Iterator[Prediction]) -> None:
        """Write rows as they come. If `rows` fails, those so far remain, and the log names their file."""
        try:
            append_predictions(self.path, rows)
        except BaseException:
            if unfinished(self.path).is_file():
                log.error(
                    "the evaluation ended early; the predictions so far are in %s, and the same command resumes it",
                    unfinished(self.path),
                )
            raise

    def finish(self) -> None:
        """Give the predictions their name. All rows must be written."""
        unfinished(self.path).replace(self.path)
        self._settings_path.unlink()

    def _differences(self) -> list[str]:
        """Return the names of the settings in which the evaluation on disk differs."""
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ["settings that are not recorded"]
        names = {**before, **self._settings} if isinstance(before, dict) else self._settings
        return [name for name in names if before.get(name) != self._settings.get(name)]


def _drop_partial_line(path: Path) -> None:
    """Cut a line whose end was not written."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)


def _whole_batches(
    rows: Sequence[Prediction], indexes: Sequence[ShardIndex], planned: Sequence[int], batch_size: int
) -> Done:
    """Return the rows of complete folders and, of the last folder, those before its last batch."""
    last = max((row.folder for row in rows), default=-1)
    kept: list[Prediction] = []
    starts = []
    for folder, (index, count) in enumerate(zip(indexes, planned, strict=True)):
        here = [row for row in rows if row.folder == folder]
        if folder < last or (here and index.index_of_key(here[-1].key) + 1 == count):
            kept += here
            starts.append(count)
            continue
        # The last batch is repeated even if it is whole: unreadable samples may follow it, and a loader needs at least
        # one sample that can be read.
        here = here[: max(len(here) - 1, 0) // batch_size * batch_size]
        kept += here
        starts.append(index.index_of_key(here[-1].key) + 1 if here else 0)
    return Done(kept, starts)
