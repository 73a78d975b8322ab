"""The scores that a comparison knows, as functions of sums over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.answers import closed_correct, exact, open_recall
from medalign.evaluation.metrics.reports import bleu_counts, bleu_points, has_other_letters, rouge_l
from medalign.evaluation.metrics.scores import group

Value = Callable[[Prediction], float | None]


@dataclass(frozen=True)
class Measure:
    """One score of a set of predictions.

    Attributes:
        label: its name in tables.
        applies: whether a sample counts. It depends on the question and the reference only, except for attention.
        value: the value of one sample; None for BLEU, which is not a mean.
        binary: whether each value is 0 or 1.
        scale: factor for tables.
    """

    label: str
    applies: Callable[[Prediction], bool]
    value: Callable[[Prediction], float] | None
    binary: bool = False
    scale: float = 100.0

    def statistics(self, rows: Sequence[Prediction]) -> np.ndarray:
        """Return what is summed over samples, [samples, K]: value and count, or the counts of BLEU."""
        if self.value is None:
            return bleu_counts([row.prediction for row in rows], [row.answer for row in rows])
        return np.array([[value, 1.0] for value in self.values(rows)], dtype=np.float64)

    def values(self, rows: Sequence[Prediction]) -> list[float]:
        """Return the value of each sample of a score that is a mean over samples."""
        assert self.value is not None, f"{self.label} is not a mean over samples"
        return [self.value(row) for row in rows]

    def score(self, rows: Sequence[Prediction]) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function from sums [R, K] to scores [R]. It depends on the references only."""
        if self.value is None:
            effective = has_other_letters([row.answer for row in rows])
            return lambda sums_RK: np.array([bleu_points(sums_K, effective) for sums_K in sums_RK])
        return lambda sums_RK: sums_RK[:, 0] / sums_RK[:, 1]


def _of(*groups: str) -> Callable[[Prediction], bool]:
    return lambda row: group(row) in groups


def _correct(row: Prediction) -> float:
    return float((closed_correct if group(row) == "closed" else exact)(row.prediction, row.answer))


def _given(name: str) -> tuple[Callable[[Prediction], bool], Callable[[Prediction], float]]:
    return lambda row: getattr(row, name) is not None, lambda row: float(getattr(row, name))


MEASURES: dict[str, Measure] = {
    "questions_correct": Measure("questions correct", _of("closed", "open"), _correct, binary=True),
    "closed_accuracy": Measure("closed accuracy", _of("closed"), _correct, binary=True),
    "open_exact": Measure("open exact", _of("open"), _correct, binary=True),
    "open_recall": Measure("open recall", _of("open"), lambda row: open_recall(row.prediction, row.answer)),
    "bleu": Measure("BLEU", _of("report"), None, scale=1.0),
    "rouge_l": Measure("ROUGE-L", _of("report"), lambda row: rouge_l(row.prediction, row.answer)),
    "attention_inside": Measure("attention inside", *_given("attention_inside")),
    "pointing_hits": Measure("pointing hits", *_given("pointing_hit"), binary=True),
}
