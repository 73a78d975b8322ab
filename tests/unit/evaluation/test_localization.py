"""Average precision and IoU of maps, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from medalign.errors import DataError
from medalign.evaluation.grounding import grounding
from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.localization import localization
from medalign.evaluation.overlap import THRESHOLDS, Region, average_precision, ious
from medalign.geometry import CanvasFrame, PatchGrid

GRID = PatchGrid(4, 4)
BOXES = [(10.0, 3.0, 30.0, 25.0), (28.0, 20.0, 40.0, 31.0)]
WIDE = CanvasFrame(64, 32)  # two of four rows are padding


def two_by_two(inside: tuple[float, ...], picture: tuple[float, ...] = (1, 1, 1, 1)) -> Region:
    return Region(np.array(inside, dtype=float), np.array(picture, dtype=float))


@pytest.mark.parametrize("frame", [CanvasFrame(64, 64), WIDE])
@pytest.mark.parametrize("levels", [1000, 3])  # with 3 levels, most patches are tied
def test_average_precision_equals_scikit_learn(frame, levels):
    """There, each patch is two samples: the covered area, and the rest of what it shows of the image."""
    map_N = np.random.default_rng(0).integers(0, levels, 16) / levels
    region = Region.of_boxes(BOXES, frame, GRID)
    weights = np.concatenate([region.inside_N, region.picture_N - region.inside_N])
    expected = average_precision_score(np.repeat([1, 0], 16), np.tile(map_N, 2), sample_weight=weights)
    assert average_precision(map_N, region) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_map_without_contrast_scores_the_area(value):
    region = Region.of_boxes(BOXES, WIDE, GRID)
    map_N = np.full(16, value)
    assert average_precision(map_N, region) == pytest.approx(region.area)
    assert ious(map_N, region) == pytest.approx(np.full(100, region.area))
    assert region.area == pytest.approx(grounding(np.ones(16), BOXES, WIDE, GRID).area)


def test_the_region_itself_is_perfect_and_its_opposite_is_not():
    region = two_by_two((1, 0, 0, 0))
    assert average_precision(region.inside_N, region) == 1.0 and ious(region.inside_N, region)[1:].min() == 1.0
    assert average_precision(1 - region.inside_N, region) == pytest.approx(1 / 4)


def test_iou_by_hand():
    """Patch 2 is half covered. From 0.51 on, only patch 0 is chosen: 1 of 1.5. Below, patch 1 too: 1 of 2.5."""
    found = ious(np.array([2.0, 1.0, 0.0, 0.0]), two_by_two((1, 0, 0.5, 0)))
    at = dict(zip(THRESHOLDS.tolist(), found.tolist(), strict=True))
    assert (
        at[0.51] == pytest.approx(1 / 1.5) and at[0.5] == pytest.approx(1 / 2.5) and at[0.0] == pytest.approx(1.5 / 4)
    )


def test_values_on_padding_change_nothing():
    region, map_N = Region.of_boxes(BOXES, WIDE, GRID), np.random.default_rng(1).random(16)
    padded_N = np.where(region.picture_N > 0, map_N, 9.0)
    assert average_precision(padded_N, region) == average_precision(map_N, region)
    assert (ious(padded_N, region) == ious(map_N, region)).all() and region.share(padded_N) == region.share(map_N)


def test_one_threshold_for_all_samples_and_never_below_the_uniform_map():
    region = two_by_two((1, 0, 0, 0))
    good, bad = np.array([1.0, 0.3, 0.3, 0.3]), np.array([0.2, 1.0, 0.2, 0.2])
    found = localization("box", [(good, region), (bad, region)])
    assert found["box_iou"] == pytest.approx((1 + 0) / 2) and found["box_iou_threshold"] == 0.31
    assert found["box_iou_uniform"] == found["box_ap_uniform"] == 1 / 4
    assert localization("box", [(bad, region)])["box_iou"] == 1 / 4  # all patches, as no other choice is better
    assert localization("box", []) == {}


@pytest.mark.parametrize("size", [(40, 40), (30, 40), (41, 23)])
def test_a_mask_of_a_box_is_that_box(size):
    x0, y0, x1, y1 = box = (3, 5, 21, 17)
    mask = Image.new("1", size)
    mask.paste(1, (x0, y0, x1, y1))
    ours, expected = Region.of_mask(mask, GRID), Region.of_boxes([box], CanvasFrame(*size), GRID)
    np.testing.assert_allclose(ours.inside_N, expected.inside_N, atol=1e-8)  # coverage rounds to 1e-9 of a patch
    assert ours.area == pytest.approx(expected.area, abs=1e-8)
    colored = Image.merge("RGB", [mask.convert("L"), Image.new("L", size), Image.new("L", size)])
    np.testing.assert_allclose(Region.of_mask(colored, GRID).inside_N, ours.inside_N)
    opaque, hidden = colored.convert("RGBA"), Image.new("RGBA", size, "white")
    hidden.putalpha(mask.convert("L"))
    for with_alpha in (opaque, hidden, hidden.convert("LA")):
        np.testing.assert_allclose(Region.of_mask(with_alpha, GRID).inside_N, ours.inside_N)


def test_what_is_outside_of_the_image_does_not_count():
    frame = CanvasFrame(30, 40)
    beyond, inside = (Region.of_boxes([box], frame, GRID) for box in ((-9, -9, 12, 50), (0, 0, 12, 40)))
    np.testing.assert_array_equal(beyond.inside_N, inside.inside_N)
    assert not Region.of_boxes([(-1, 0, 0, 10)], frame, GRID).inside_N.any()


def row(**values) -> Prediction:
    return Prediction("a", "vqa", "Where?", "left", "open", "left", **values)


def test_scores_come_from_the_rows():
    map_N = np.random.default_rng(0).random(16)
    boxed = row(attention=map_N.tolist(), boxes=[list(box) for box in BOXES], image_size=(64, 64))
    outside = row(attention=map_N.tolist(), boxes=[[65.0, 0.0, 66.0, 9.0]], image_size=(64, 64))
    rows = [boxed, outside, row(attention=map_N.tolist(), image_size=(64, 64)), row()]
    found = score(rows, GRID)
    region = Region.of_boxes(BOXES, CanvasFrame(64, 64), GRID)
    assert found["box_ap"] == pytest.approx(average_precision(map_N, region), abs=1e-3)  # 4 digits are stored
    assert found["box_ap_low"] == found["box_ap_high"] == found["box_ap"]
    assert not [name for name in score(rows[1:], GRID) if name.startswith("box")]
    assert "box_ap" not in score(rows)  # without the grid
    with pytest.raises(DataError, match="'a'.*shape"):
        score([boxed], PatchGrid(5, 5))
