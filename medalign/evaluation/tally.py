"""Counts of an evaluation, apart from its scores: truncated or empty answers, skipped or duplicate samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.counts import count

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Tally:
    """The predictions of an evaluation.

    Attributes:
        rows: the predictions.
        unreadable: number of samples that have none.
    """

    rows: list[Prediction]
    unreadable: int = 0

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
