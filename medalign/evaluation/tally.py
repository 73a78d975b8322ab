"""What an evaluation counts beside its scores: answers that were cut or empty, samples left out or asked twice."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from medalign.data.batches.loader import check_skip_rate
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.predictions import LENGTH

log = logging.getLogger("medalign")


@dataclass
class Tally:
    """The predictions so far and what happened on the way to them."""

    max_skip_fraction: float
    rows: list[Prediction] = field(default_factory=list)
    unreadable: int = 0
    truncated: int = 0

    def add(self, predicted: PredictionBatch) -> None:
        """Raises DataError when too many samples could not be read."""
        self.rows += predicted.rows
        self.truncated += predicted.cut
        self.unreadable += len(predicted.unreadable)
        seen = len(self.rows) + self.unreadable
        check_skip_rate(self.unreadable, seen, self.max_skip_fraction, predicted.unreadable, "--max-skip-fraction")

    def counts(self) -> dict[str, int]:
        """The counts of scores.json.

        | key | what |
        | --- | --- |
        | unreadable | samples that could not be read and are in no score |
        | truncated | questions cut to the length limit |
        | answers_cut | answers without an end token: generation stopped at its limit |
        | answers_empty | answers without text |
        | without_image | samples without image, in the scores of texts only |
        | duplicates | samples with key, question and answer of one in another folder; both count |
        """
        same = {(row.key, row.task, row.question, row.answer) for row in self.rows}
        return {
            "unreadable": self.unreadable,
            "truncated": self.truncated,
            "answers_cut": sum(row.finish_reason == LENGTH for row in self.rows),
            "answers_empty": sum(row.empty for row in self.rows),
            "without_image": sum(row.image_size is None for row in self.rows),
            "duplicates": len(self.rows) - len(same),
        }

    def warn(self, max_length: int, max_new_tokens: int) -> None:
        """Tell in the log what a limit has cut, and which option raises it."""
        counts = self.counts()
        if self.truncated:
            log.warning("%d questions were cut to %d tokens; --max-length raises the limit", self.truncated, max_length)
        if cut := counts["answers_cut"]:
            told = "%d of %d answers were cut at %d tokens; --max-new-tokens raises the limit"
            log.warning(told, cut, len(self.rows), max_new_tokens)
        if empty := counts["answers_empty"]:
            log.warning("%d of %d answers are empty", empty, len(self.rows))
