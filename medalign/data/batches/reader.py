"""Read the samples of a micro-batch, replace those that cannot be used, and limit how many are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.indices import MicroBatchIndices
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import DataError, MedAlignError

MAX_REPLACEMENT_DISTANCE = 10_000  # samples tried after a bad one; if all are bad, the data set is unusable
MIN_SKIP_RATE_SAMPLES = 100  # a few bad samples at the start of a run are compared with this number of samples


class MicroBatchDataset(Dataset[Any]):
    """Reads a micro-batch. Errors are returned, not raised, because a worker would obscure their message."""

    def __init__(self, index: ShardIndex, collator: Collator) -> None:
        self._index = index
        self._collator = collator

    def __getitem__(self, work: MicroBatchIndices) -> Batch | MedAlignError:
        skipped: list[str] = []
        try:
            self._index.prefetch([*work.indices, *work.next_indices])
            prepared = [self._read_or_replace(index, skipped) for index in work.indices]
            batch = self._collator.join(prepared) if prepared else self._collator.dummy_batch()
        except MedAlignError as error:
            return error
        return replace(batch, skipped=tuple(skipped))

    def _read_or_replace(self, index: int, skipped: list[str]) -> Prepared:
        """Prepare the sample, or the next one that can be used. Only the reason for the first one is recorded."""
        size = len(self._index)
        tries = min(size, MAX_REPLACEMENT_DISTANCE)
        reason = ""
        for step in range(tries):
            try:
                sample = self._index.read((index + step) % size, self._collator.pixels)
                prepared = prepare(self._collator, sample)
            except BadSample as error:
                reason = reason or str(error)
                continue
            if reason:
                skipped.append(reason)
            return prepared
        raise DataError(f"none of the {tries} samples from index {index} on can be used; the first reason: {reason}")


def prepare(collator: Collator, sample: Sample) -> Prepared:
    """Prepare a sample for a batch. Raises BadSample if template, tokenizer or preprocessing reject it."""
    with as_bad_sample(f"{sample.shard}/{sample.key}"):
        return collator.prepare(sample)


def check_skip_rate(
    skipped: int,
    seen: int,
    max_fraction: float,
    last_reasons: Sequence[str] = (),
    setting: str = "data.max_skip_fraction",
    what: str = "samples",
) -> None:
    """Check that not too many samples were skipped since the start of the run.

    Until MIN_SKIP_RATE_SAMPLES samples were seen, the limit is that for MIN_SKIP_RATE_SAMPLES samples.

    Args:
        skipped: skipped samples of all ranks.
        seen: samples drawn by all ranks.
        max_fraction: largest allowed fraction of skipped samples.
        last_reasons: why samples of this rank were skipped, for the message.
        setting: the user's name of `max_fraction`, for the message.
        what: what was counted, for the message.

    Raises:
        DataError: the fraction is above `max_fraction`.
    """
    if skipped > max_fraction * max(seen, MIN_SKIP_RATE_SAMPLES):
        reasons = f"the last were {'; '.join(last_reasons[-3:])}" if last_reasons else "see the log of the other ranks"
        raise DataError(
            f"{skipped} of {seen} {what} could not be used, more than {setting} {max_fraction}; {reasons}. "
            f"Repair or repack the shards, or raise {setting}"
        )
