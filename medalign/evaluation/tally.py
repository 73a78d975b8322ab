"""Counts of an evaluation, apart from its scores: truncated or empty answers, skipped or duplicate samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from medalign.data.batches.reader import check_skip_rate
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.counts import count

log = logging.getLogger("medalign")


@dataclass
class Tally:
    """The predictions so far, and the samples that were skipped or truncated.

    Args:
        max_skip_fraction: fraction of the samples that may be unreadable.
    """

    max_skip_fraction: float
    rows: list[Prediction] = field(default_factory=list)
    unreadable: int = 0

    def add(self, predicted: PredictionBatch) -> None:
        """Add a batch of predictions.

        Raises:
            DataError: too many samples could not be read.
        """
        self.rows += predicted.rows
        self.unreadable += len(predicted.unreadable)
        check_skip_rate(self.unreadable, self.seen, self.max_skip_fraction, predicted.unreadable, "--max-skip-fraction")

    @property
    def seen(self) -> int:
        """Number of samples so far."""
        return len(self.rows) + self.unreadable

    @property
    def truncated(self) -> int:
        """Number of questions that were truncated to the maximum length."""
        return sum(row.truncated for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Return the counts for scores.json: those of `metrics.counts`, and two of the evaluation.

        | key | meaning |
        | --- | --- |
        | unreadable | samples that could not be read; no score includes them |
        | truncated | questions truncated to the maximum length |
        """
        return {"unreadable": self.unreadable, "truncated": self.truncated, **count(self.rows)}

    def warn(self, max_length: int, max_new_tokens: int) -> None:
        """Log what was truncated at a limit, and the option that raises the limit.

        Args:
            max_length: limit of a question and its images, in tokens.
            max_new_tokens: limit of an answer, in tokens.
        """
        counts = self.counts()
        if self.truncated:
            message = "%d questions were truncated to %d tokens; --max-length raises the limit"
            log.warning(message, self.truncated, max_length)
        if cut := counts["answers_cut"]:
            message = "%d of %d answers were cut off at %d tokens; --max-new-tokens raises the limit"
            log.warning(message, cut, len(self.rows), max_new_tokens)
        if empty := counts["answers_empty"]:
            log.warning("%d of %d answers are empty", empty, len(self.rows))
