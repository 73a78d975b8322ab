"""Answers samples with a trained student: on any number of ranks, resumable, ended in order by a signal.

Each rank has the whole student and takes the next batch that no rank has taken. The batches do not depend on the number
of ranks, so neither do the answers. Rank 0 puts the answers in the order of the samples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from medalign import distributed, errors
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.reader import check_skip_rate
from medalign.data.samples.bad_sample import BadSample
from medalign.decoding.base import Decoding
from medalign.errors import DataError, MedAlignError, Stopped
from medalign.evaluation.batching import Place, Samples, describe_batches, plan_batches, read_or_reason
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.journal import Entry, Journal
from medalign.evaluation.tally import Tally
from medalign.observability.progress import ProgressReporter
from medalign.stop_signals import StopSignals
from medalign.student.model import Student
from medalign.work_queue import WorkQueue

log = logging.getLogger("medalign")

_INTERRUPT = "KeyboardInterrupt"
_FAULT, _LOST = "fault", "lost"
_SEEN, _UNREADABLE = "seen", "unreadable"

Found = list[Sample | BadSample]
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Work:
    """The samples that a command answers.

    Attributes:
        name: of the command, for the log.
        folders: the samples.
        planned: how many samples of each folder are answered.
        batch_size: samples per batch.
        max_skip_fraction: fraction of the samples that may be unreadable.
        signals: those that this process has received since the command began.
        more: whether other work follows. A signal during the last batch then stops the command, too.
    """

    name: str
    folders: Sequence[Samples]
    planned: Sequence[int]
    batch_size: int
    max_skip_fraction: float
    signals: StopSignals
    more: bool = False

    def read(self, batch: Sequence[Place]) -> Found:
        """Read a batch."""
        return [read_or_reason(self.folders[place.folder], place.sample) for place in batch]


def describe_answering(student: Student, collator: Collator, batch_size: int, decoding: Decoding) -> dict[str, Any]:
    """Return the settings that determine answers, beside samples, weights and versions."""
    return {
        "batch_size": batch_size,
        **decoding.describe(),
        "max_length": collator.encoder.max_length,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": distributed.device().type,
    }


def answer_all(
    work: Work,
    output: Path,
    settings: Mapping[str, Any],
    ask: Callable[[Found], PredictionBatch],
    store: dist.Store,
) -> tuple[Tally, Journal]:
    """Answer all samples that an interrupted call has not answered. Every rank must call it.

    Args:
        work: the samples.
        output: the file of predictions that the caller writes. The journal is beside it.
        settings: all that determines the answers, as JSON values.
        ask: answers a batch.
        store: of all ranks.

    Returns:
        On rank 0, the predictions in the order of the samples; on the others, none. And the journal, which rank 0
        finishes once the predictions are written.

    Raises:
        DataError: too many samples cannot be read.
        Stopped: a signal ended it on all ranks.
    """
    batches = plan_batches(work.folders, work.planned, work.batch_size)
    journal = Journal(output, {**settings, "batches": describe_batches(batches)})
    done, seen, unreadable = _resume(journal, sum(work.planned))
    left = [number for number in range(len(batches)) if number not in done]
    queue = WorkQueue(store, f"{work.name} {output}", len(left))  # a call may answer the samples several times
    if distributed.is_main():
        queue.add(_SEEN, seen)
        queue.add(_UNREADABLE, unreadable)
    distributed.barrier()
    try:
        with distributed.raise_on_all_ranks(), _tell_other_ranks(queue):
            _answer(work, batches, (left[piece] for piece in queue), journal, ask, queue)
        _require_all(queue, sum(work.planned), work.more)
    except BaseException:
        journal.report()
        raise
    entries: list[Entry] = []
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            entries = journal.entries()
            _require_entries(entries, len(batches), output)
    rows = sorted((row for entry in entries for row in entry.rows), key=lambda placed: placed[0])
    return Tally([row for _, row in rows], sum(entry.unreadable for entry in entries)), journal


def _require_entries(entries: Sequence[Entry], batches: int, output: Path) -> None:
    if len(entries) < batches:
        raise DataError(
            f"{output.parent}: the answers of {batches - len(entries)} of {batches} batches are not there, although "
            "all ranks have written theirs; the folder must be one that all ranks share, and the same command then "
            "answers what is missing"
        )


def _resume(journal: Journal, total: int) -> tuple[set[int], int, int]:
    """Return the numbers of the batches that are done, the samples in them, and how many of these are unreadable."""
    found: list[Entry] = []
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            found = journal.resume()
    if found:
        samples = sum(entry.samples for entry in found)
        log.info("resuming an interrupted evaluation after %d of %d samples", samples, total)
    facts = [[entry.batch for entry in found], sum(e.samples for e in found), sum(e.unreadable for e in found)]
    done, seen, unreadable = json.loads(distributed.broadcast_from_main(json.dumps(facts)))
    return set(done), seen, unreadable


def _answer(
    work: Work,
    batches: Sequence[Sequence[Place]],
    numbers: Iterator[int],
    journal: Journal,
    ask: Callable[[Found], PredictionBatch],
    queue: WorkQueue,
) -> None:
    """Answer the batches that this rank takes, until none is left or a rank has asked all to stop."""
    total = sum(work.planned)
    with ProgressReporter(work.name, total, "samples") as progress, journal.writer() as append:
        progress.reach(queue.add(_SEEN, 0))
        for number, samples in _ahead(lambda number: work.read(batches[number]), numbers):
            predicted = ask(samples)
            append(number, batches[number], predicted)
            unreadable = queue.add(_UNREADABLE, len(predicted.unreadable))
            check_skip_rate(unreadable, total, work.max_skip_fraction, predicted.unreadable, "--max-skip-fraction")
            progress.reach(queue.add(_SEEN, len(samples)))
            if work.signals.request is not None:
                queue.stop(work.signals.request.__name__)
            if queue.stop_reason:
                return


@contextmanager
def _tell_other_ranks(queue: WorkQueue) -> Iterator[None]:
    """Stop all ranks if this one fails or is interrupted, and this one if another is lost.

    A rank that is lost takes part in no further collective operation, so the others must not wait in one.
    """
    try:
        yield
    except (MedAlignError, OSError):
        queue.stop(_FAULT)
        raise
    except BaseException as error:
        with suppress(dist.DistError):
            queue.stop(_INTERRUPT if isinstance(error, KeyboardInterrupt) else _LOST)
        raise
    if queue.stop_reason == _INTERRUPT:
        raise KeyboardInterrupt
    if queue.stop_reason == _LOST:
        raise RuntimeError("another rank has ended with an error, which its output shows")


def _require_all(queue: WorkQueue, total: int, more: bool) -> None:
    """Raise Stopped on all ranks if a signal has ended the work early, and DataError if no sample can be used."""
    seen, unreadable, reason = queue.add(_SEEN, 0), queue.add(_UNREADABLE, 0), queue.stop_reason
    distributed.barrier()  # rank 0, which has the store, must not end before the others have read it
    if seen < total or (more and reason):
        stopped: type[Stopped] = getattr(errors, reason)
        raise stopped(f"stopped after {seen} of {total} samples")
    if unreadable == total:
        raise DataError(f"none of the {total} samples can be used; the log has the reason for each")


def _ahead(read: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[tuple[Item, Value]]:
    """Yield each item with what `read` returns for it; the next one is read meanwhile."""
    waiting: tuple[Item, Future[Value]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            following = item, pool.submit(read, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
