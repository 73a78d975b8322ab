"""Batches of an evaluation: every sample once, similar lengths together, the longest first."""

from __future__ import annotations

import numpy as np

from medalign.evaluation.batching import Place, describe_batches, plan_batches


class Lengths(list):
    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array(self)[indices]


def test_similar_lengths_are_together_across_folders():
    folders = [Lengths([5, 90, 7, 1000]), Lengths([91, 6])]
    batches = plan_batches(folders, [3, 2], 2)  # type: ignore[arg-type]
    assert batches == [[Place(1, 0), Place(0, 1)], [Place(0, 2), Place(1, 1)], [Place(0, 0)]]
    assert sorted(place for batch in batches for place in batch) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_equal_lengths_keep_their_order():
    assert plan_batches([Lengths([4] * 5)], [5], 3) == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4)]]  # type: ignore[list-item]


def test_the_description_depends_on_which_samples_are_together():
    one, two = ([[Place(0, 0), Place(0, 1)]], [[Place(0, 0)], [Place(0, 1)]])
    assert describe_batches(one) == describe_batches([[Place(0, 0), Place(0, 1)]]) != describe_batches(two)
