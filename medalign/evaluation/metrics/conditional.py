"""Whether the attention follows the question: scores of pairs of questions about one image.

A high share of attention inside the boxes does not show it, because a map that is the same for every question can have
one. Here two questions about one image are compared whose boxes have none in common. Both directions of a pair count,
so a map that does not know the question prefers the asked boxes in exactly half of the cases, and its peak lies in the
asked boxes as often as in those of the other question.

| key | meaning |
| --- | --- |
| conditional_n | images with such a pair |
| asked_denser, asked_denser_chance | share of cases in which the attention is denser in the asked boxes than in those of the other question (a tie is half a case); 0.5 |
| asked_pointing, other_pointing | share of cases whose largest value hits the asked boxes, and those of the other question |
| map_change | total variation between the maps of the two questions, 0 for equal maps and 1 for disjoint ones |
| map_change_same | the same for two questions with equal boxes: the change that is due to the words |

Each image counts once, with the mean over its pairs, so intervals are those of resampled images. Requests for reports
do not count, because they ask for everything. Attention to padding is removed first.

Shape suffixes: N patches.
"""  # noqa: E501, a table cannot be wrapped

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np

from medalign.errors import DataError
from medalign.evaluation.grounding import check_map, patches_hit
from medalign.evaluation.metrics.intervals import mean
from medalign.evaluation.metrics.predictions import Prediction, rounded
from medalign.geometry import CanvasFrame, PatchGrid, coverage

CHANCE = 0.5
Boxes = frozenset[tuple[float, ...]]


@dataclass(frozen=True)
class Asked:
    """A question's map and boxes on the grid."""

    question: str
    boxes: Boxes
    map_N: np.ndarray  # sums to 1; 0 on padding
    inside_N: np.ndarray  # fraction of each patch that the boxes cover
    hits_N: np.ndarray  # bool

    def density(self, other: Asked) -> float:
        """Return the mean of this question's map over the boxes of another question."""
        return float((self.map_N * other.inside_N).sum() / other.inside_N.sum())

    def points_at(self, other: Asked) -> bool:
        """Return whether the first of the largest values hits the boxes of another question."""
        return bool(other.hits_N[self.map_N.argmax()])

    def change(self, other: Asked) -> float:
        """Return the total variation between the maps of two questions."""
        return float(np.abs(self.map_N - other.map_N).sum() / 2)


def conditional(rows: Sequence[Prediction], grid: PatchGrid) -> dict[str, Any]:
    """Compute the scores of the table above. They are omitted if no image has a pair.

    Args:
        rows: predictions; those without the digest of their image are left out.
        grid: the grid of the attention.

    Raises:
        DataError: the attention of a row does not fit the grid.
    """
    images: dict[tuple[int, str], list[Asked]] = defaultdict(list)
    for row in rows:
        if row.image and row.task == "vqa" and (asked := _asked(row, grid)):
            images[row.folder, row.image].append(asked)
    found: dict[str, list[float]] = defaultdict(list)
    for questions in images.values():
        for name, values in _of_image(questions).items():
            if values:
                found[name].append(float(np.mean(values)))
    scores: dict[str, Any] = {"conditional_n": len(found["asked_denser"])}
    for name, values in found.items():
        scores |= mean(name, values)
    return scores | ({"asked_denser_chance": CHANCE} if found["asked_denser"] else {})


def _of_image(questions: Sequence[Asked]) -> dict[str, list[float]]:
    """Return the values of each pair of questions about one image."""
    cases = [(one, other) for one, other in permutations(questions, 2) if not one.boxes & other.boxes]
    same = [(a, b) for a, b in combinations(questions, 2) if a.boxes == b.boxes and a.question != b.question]
    return {
        "asked_denser": [_compared(one.density(one), one.density(other)) for one, other in cases],
        "asked_pointing": [float(one.points_at(one)) for one, _ in cases],
        "other_pointing": [float(one.points_at(other)) for one, other in cases],
        "map_change": [one.change(other) for one, other in cases],
        "map_change_same": [one.change(other) for one, other in same],
    }


def _compared(asked: float, other: float) -> float:
    return CHANCE if asked == other else float(asked > other)


def _asked(row: Prediction, grid: PatchGrid) -> Asked | None:
    """Return the map and boxes of a row; None if it has no attention on the image, or no boxes inside it."""
    if row.attention is None or row.image_size is None:
        return None
    frame = CanvasFrame(*row.image_size)
    picture_N = coverage([frame.picture], grid)
    inside_N = np.minimum(coverage([frame.to_unit(box) for box in row.boxes], grid), picture_N)
    try:
        map_N = check_map(rounded(row.attention), grid) * picture_N
    except ValueError as error:
        raise DataError(f"prediction {row.key!r}: {error}; evaluate again") from error
    if not inside_N.any() or not map_N.any():
        return None
    boxes = frozenset(tuple(box) for box in row.boxes)
    hits_N = patches_hit([frame.to_unit(box) for box in row.boxes], grid) & (picture_N > 0)
    return Asked(row.question, boxes, map_N / map_N.sum(), inside_N, hits_N)
