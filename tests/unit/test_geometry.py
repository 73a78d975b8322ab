"""The canvas, patch grids, and conversions between them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medalign.geometry import (
    CanvasFrame,
    PatchGrid,
    PreprocessCfg,
    coverage,
    gather_images,
    resample_map,
    resize,
    square_canvas,
)


def test_canvas_centers_the_image_and_keeps_its_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 6), dtype=np.uint8))
    canvas = np.array(square_canvas(image))
    assert canvas.shape == (10, 10, 3)
    assert (canvas[:, 2:8, 0] == np.array(image)).all()
    assert canvas[:, :2].max() == 0 and canvas[:, 8:].max() == 0


def test_unit_boxes_follow_the_padding():
    frame = CanvasFrame(width=50, height=100)
    assert frame.to_unit((0, 0, 50, 100)) == (0.25, 0.0, 0.75, 1.0) == frame.picture


def test_coverage_counts_overlapping_boxes_once():
    share = coverage([(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)], PatchGrid(2, 2))
    assert share.tolist() == [1, 0, 0, 0]
    assert coverage([(0, 0, 0.25, 0.5)], PatchGrid(2, 2)).tolist() == [0.5, 0, 0, 0]


def test_coverage_is_exact_for_slivers_and_clean_at_patch_edges():
    share = coverage([(0.3, -1, 0.3001, 2)], PatchGrid(1, 10))
    assert share.tolist() == pytest.approx([0, 0, 0, 0.001, 0, 0, 0, 0, 0, 0], abs=1e-9)
    assert share[2] == 0  # 0.3 x 10 is not quite 3 in floating point
    assert coverage([], PatchGrid(2, 3)).tolist() == [0] * 6


def test_resampling_keeps_a_constant_and_a_ramp():
    ramp = torch.arange(4.0).repeat(4, 1).reshape(1, 16)
    fine = resample_map(ramp, PatchGrid(4, 4), PatchGrid(8, 8)).reshape(8, 8)
    assert torch.allclose(fine[0], fine[7])
    assert torch.allclose(fine[0, 1:7], torch.arange(0.25, 3.0, 0.5))


def test_view_normalizes():
    pixels = PreprocessCfg(4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).view(Image.new("RGB", (9, 9), (255, 255, 255)))
    assert pixels.shape == (3, 4, 4) and torch.allclose(pixels, torch.full_like(pixels, 2.0))


def test_gather_images_orders_tokens_by_image():
    index = torch.tensor([[-1, 0, 0, 1, 1], [2, 2, -1, -1, -1]])
    values = torch.arange(10.0).reshape(2, 5)
    assert gather_images(values, index >= 0, 3, 2).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_gray_square_gives_the_pixels_of_its_rgb_form():
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    tower = PreprocessCfg(33, mean, std)
    one, three = tower.view(square_canvas(gray)), tower.view(gray.convert("RGB"))
    assert one.shape == (3, 33, 33)
    assert torch.equal(one, three)


@settings(deadline=None)
@example(512, 512, 336, "L")
@example(625, 625, 518, "L")  # neither divides by four
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.sampled_from(["L", "RGB"]))
def test_resizing_gives_the_pixels_of_pillow(width: int, height: int, size: int, mode: str) -> None:
    noise = np.random.default_rng(width + 100 * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise).convert(mode), Image.fromarray(noise).convert(mode).resize((width, width))):
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        assert np.array_equal(resize(image, size), expected)
