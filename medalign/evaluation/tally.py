"""Counts of an evaluation, apart from its scores: truncated or empty answers, skipped or duplicate samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from medalign.data.batches.reader import check_skip_rate
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.predictions import LENGTH

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
    truncated: int = 0

    def add(self, predicted: PredictionBatch) -> None:
        """Add a batch of predictions.

        Raises:
            DataError: too many samples could not be read.
        """
        self.rows += predicted.rows
        self.truncated += predicted.truncated
        self.unreadable += len(predicted.unreadable)
        seen = len(self.rows) + self.unreadable
        check_skip_rate(self.unreadable, seen, self.max_skip_fraction, predicted.unreadable, "--max-skip-fraction")

    def counts(self) -> dict[str, int]:
        """Return the counts for scores.json.

        | key | meaning |
        | --- | --- |
        | unreadable | samples that could not be read; no score includes them |
        | truncated | questions truncated to the maximum length |
        | answers_cut | answers without an end token: generation stopped at its limit |
        | answers_empty | answers without text |
        | without_image | samples without an image; only scores of text include them |
        | duplicates | samples whose key, question and answer also occur in another folder; both count |
        """
        unique = {(row.key, row.task, row.question, row.answer) for row in self.rows}
        return {
            "unreadable": self.unreadable,
            "truncated": self.truncated,
            "answers_cut": sum(row.finish_reason == LENGTH for row in self.rows),
            "answers_empty": sum(row.empty for row in self.rows),
            "without_image": sum(row.image_size is None for row in self.rows),
            "duplicates": len(self.rows) - len(unique),
        }

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
