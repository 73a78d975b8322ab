from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medalign.evaluation.report.pictures import BOX_COLOR, MIN_SIDE, draw_boxes, overlay
from medalign.geometry import PatchGrid

GRID = PatchGrid(4, 4)
GREY = 100


def gray(width: int, height: int, mode: str = "L") -> Image.Image:
    return Image.new("L", (width, height), GREY).convert(mode)


def changed(picture: Image.Image) -> np.ndarray:
    """Difference of each pixel from the original gray, [h, w]."""
    return np.abs(np.asarray(picture, dtype=int) - GREY).max(axis=-1)


def one_hot(patch: int) -> np.ndarray:
    values_N = np.zeros(16)
    values_N[patch] = 1.0
    return values_N


@pytest.mark.parametrize(
    ("size", "patch", "center"),
    [
        ((800, 800), 6, (500, 300)),  # row 1, column 2 of 200-pixel patches
        ((800, 400), 6, (500, 100)),  # the canvas has 200 rows of padding above
        ((400, 800), 6, (300, 300)),  # the canvas has 200 columns of padding on the left
    ],
)
def test_the_heat_map_is_at_the_position_of_the_patch(size, patch, center):
    heat = changed(overlay(gray(*size), one_hot(patch), GRID))
    rows, columns = np.nonzero(heat > 0.95 * heat.max())
    # the maximum is within a quarter of the side from the center of the patch
    assert np.abs(columns - center[0]).max() <= 50 and np.abs(rows - center[1]).max() <= 50
    assert columns.mean() == pytest.approx(center[0], abs=2) and rows.mean() == pytest.approx(center[1], abs=2)


def test_a_uniform_map_and_a_zero_map_change_nothing():
    for values_N in (np.full(16, 0.3), np.zeros(16)):
        assert not changed(overlay(gray(800, 400), values_N, GRID)).any()


def test_a_flat_map_is_paler_than_a_sharp_one():
    flat = np.full(16, 1.0)
    flat[6] = 1.1
    assert (
        changed(overlay(gray(800, 800), flat, GRID)).max()
        < changed(overlay(gray(800, 800), one_hot(6), GRID)).max() / 2
    )


def test_attention_on_padding_does_not_dim_the_picture():
    values_N = one_hot(6)
    alone = changed(overlay(gray(800, 400), values_N, GRID))
    values_N[0] = 50.0  # padding
    assert (alone == changed(overlay(gray(800, 400), values_N, GRID))).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "1"])
def test_small_images_of_any_mode_are_enlarged(mode):
    picture = overlay(Image.new(mode, (64, 48)), torch.ones(16), GRID)
    assert picture.mode == "RGB" and picture.size == (MIN_SIDE, MIN_SIDE * 48 // 64)
    assert draw_boxes(Image.new(mode, (64, 48))).size == picture.size


def test_boxes_are_outlined_in_place():
    picture = np.asarray(draw_boxes(gray(100, 50), [(10, 5, 60, 45)]))
    scale = MIN_SIDE / 100
    green = (picture == BOX_COLOR).all(axis=-1)
    rows, columns = np.nonzero(green)
    assert (columns.min(), columns.max()) == (pytest.approx(10 * scale, abs=2), pytest.approx(60 * scale, abs=2))
    assert (rows.min(), rows.max()) == (pytest.approx(5 * scale, abs=2), pytest.approx(45 * scale, abs=2))
    assert not green[int(25 * scale), int(35 * scale)]
