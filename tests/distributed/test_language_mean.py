"""The language loss as a mean over samples: loss and gradient do not depend on how a batch is divided."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_worker

# Four samples of 4, 2, 7 and 1 answer tokens, two of them without an image.
COMMON = {"batch": 4, "alpha": 0.0, "beta": 0.0, "language_mean": "samples", "text_only": [1, 2]}
CUTS = {
    1: {
        "whole": {"micro": 4},
        "uneven": {"micro": 3},
        "accumulated": {"micro": 1},
        "packed": {"micro": 4, "packed": True},
        "zero3": {"micro": 2, "engine": "cpu"},
    },
    2: {
        "halves": {"micro": 2},
        "accumulated": {"micro": 1},
        "packed": {"micro": 2, "packed": True},
        "zero3": {"micro": 2, "engine": "cpu"},
    },
}


@pytest.mark.parametrize("world", CUTS)
def test_the_gradient_is_that_of_a_plain_implementation(tmp_path, student_folder, teacher_folder, world):
    """Sums in another order differ by 1e-6 of loss and gradient. A mean over tokens would differ by 75 %."""
    common = COMMON | {"engine": "zero2", "student": str(student_folder), "teacher": str(teacher_folder)}
    ranks: list[dict[str, Any]] = run_worker(
        "language_gradients", {"common": common, "scenarios": CUTS[world]}, world, tmp_path
    )
    for result in ranks:
        for name, found in result.items():
            assert found["loss"] == pytest.approx(found["plain"], rel=1e-5), name
            assert found["error"] < 1e-5, name
