from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.evaluation.grounding import grounding
from medalign.geometry import CanvasFrame, PatchGrid

GRID = PatchGrid(4, 4)
SQUARE = CanvasFrame(64, 64)  # patches of 16 x 16 pixels


def one_hot(patch: int, grid: PatchGrid = GRID) -> np.ndarray:
    values_N = np.zeros(grid.size)
    values_N[patch] = 3.0  # any scale
    return values_N


def test_all_attention_on_the_box():
    found = grounding(one_hot(5), [(16, 16, 32, 32)], SQUARE, GRID)
    assert (found.inside, found.area, found.hit, found.chance) == (1.0, 1 / 16, True, 1 / 16)


def test_a_box_that_covers_half_a_patch_holds_half_its_attention():
    found = grounding(one_hot(5), [(16, 16, 24, 32)], SQUARE, GRID)
    assert found.inside == pytest.approx(0.5) and found.area == pytest.approx(1 / 32)


def test_boxes_count_as_their_union():
    twice = grounding(one_hot(5), [(16, 16, 32, 32), (16, 16, 32, 32)], SQUARE, GRID)
    assert twice.area == pytest.approx(1 / 16) and twice.inside == pytest.approx(1.0)


@settings(deadline=None, max_examples=50)  # a slow machine is not a failure
@given(
    width=st.integers(20, 200),
    height=st.integers(20, 200),
    corner=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)),
    size=st.tuples(st.floats(0.1, 0.2), st.floats(0.1, 0.2)),
    side=st.integers(2, 16),
)
def test_uniform_attention_scores_the_area(width, height, corner, size, side):
    x0, y0 = corner[0] * width, corner[1] * height
    box = (x0, y0, x0 + size[0] * width, y0 + size[1] * height)
    found = grounding(np.full(side * side, 0.7), [box], CanvasFrame(width, height), PatchGrid(side, side))
    assert found.inside == pytest.approx(found.area)
    true = size[0] * size[1]
    assert found.area == pytest.approx(true, rel=1e-5)  # edges are rounded to 1e-9 of a patch


def test_padding_counts_neither_as_attention_nor_as_area():
    frame = CanvasFrame(64, 32)  # rows 0 and 3 of the grid are padding
    attention_N = np.zeros(16)
    attention_N[0], attention_N[5], attention_N[6] = 5.0, 1.0, 1.0
    found = grounding(attention_N, [(16, 0, 32, 16)], frame, GRID)  # patch 5: row 1, column 1
    assert found.inside == pytest.approx(0.5)
    assert found.area == pytest.approx(1 / 8)
    assert found.hit  # the maximum over the image, not over the canvas
    assert grounding(one_hot(0), [(16, 0, 32, 16)], frame, GRID).inside == 0.0


@pytest.mark.parametrize(
    ("patch", "hit"),
    [
        (5, True),  # contains the center of the tiny box
        (6, False),
        (10, False),
    ],
)
def test_a_box_between_patch_centers_can_be_hit(patch, hit):
    found = grounding(one_hot(patch), [(27, 27, 31, 31)], SQUARE, GRID)
    assert found.hit is hit and found.chance == pytest.approx(1 / 16)


def test_touching_a_large_box_is_not_a_hit_but_a_center_inside_is():
    box = (0, 0, 25, 64)  # column 0 and the centers (at 24) of column 1
    assert grounding(one_hot(1), [box], SQUARE, GRID).hit
    assert not grounding(one_hot(1), [(0, 0, 23, 64)], SQUARE, GRID).hit


def test_a_box_far_smaller_than_a_patch_counts():
    frame, grid = CanvasFrame(3000, 2400), PatchGrid(24, 24)
    box = (10, 10, 12, 12)
    patch = 2 * 24  # patches of 125 pixels, and the image starts 300 pixels below the top of the canvas
    found = grounding(np.full(grid.size, 0.5), [box], frame, grid)
    assert found.area == found.inside == pytest.approx(4 / (3000 * 2400), rel=1e-6)
    found = grounding(one_hot(patch, grid), [box], frame, grid)
    assert found.hit and found.inside == pytest.approx(4 / (125 * 75), rel=1e-6)  # of the visible part of the patch


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [(70, 70, 90, 90)],
        [(64, 10, 65, 20)],  # in the pixel beyond the edge that shards accept
        [(9, 9, 9, 20)],
    ],
)
def test_boxes_outside_the_image_have_no_score(boxes):
    assert grounding(np.ones(16), boxes, SQUARE, GRID) is None


def test_tensors_are_accepted():
    attention_N = torch.tensor(one_hot(5), dtype=torch.bfloat16, requires_grad=True)
    assert grounding(attention_N, [(16, 16, 32, 32)], SQUARE, GRID).inside == 1.0


@pytest.mark.parametrize(
    ("attention", "boxes", "message"),
    [
        (np.ones(9), [(0, 0, 9, 9)], "grid is 4 x 4"),
        (np.full(16, np.nan), [(0, 0, 9, 9)], "finite"),
        (-np.ones(16), [(0, 0, 9, 9)], "negative"),
    ],
)
def test_bad_input(attention, boxes, message):
    with pytest.raises(ValueError, match=message):
        grounding(attention, boxes, SQUARE, GRID)
