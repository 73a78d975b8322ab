"""An attention map drawn over its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from medalign.geometry import Box, CanvasFrame, PatchGrid, coverage

SMALLEST = 384  # pixels of the long side; smaller images are enlarged to it
OPACITY = 0.72  # of the strongest attention
BOX_COLOR = (88, 230, 178)
# The heat's colors, from "as much as an even spread" (transparent) to the strongest; legible without color too.
RAMP = np.array([(52, 12, 95), (150, 32, 110), (232, 88, 48), (250, 168, 38), (255, 240, 150)], dtype=np.float64)
PLACES = np.array([0.0, 0.35, 0.65, 0.85, 1.0])


def overlay(
    image: Image.Image,
    attention_N: np.ndarray | torch.Tensor | Sequence[float],
    grid: PatchGrid,
    boxes: Sequence[Box] = (),
) -> Image.Image:
    """The image with the map as heat and the boxes (image pixels) as outlines; RGB, long side at least `SMALLEST`.

    Heat begins where a patch gets more than an even spread over the picture would give it. It is full at the
    strongest patch, but never at less than twice the even share: a flat map stays pale.
    """
    heat_hw = _heat(np.asarray(attention_N, dtype=np.float64), grid, CanvasFrame(*image.size))
    pixels = np.asarray(_enlarged(image), dtype=np.float64)
    heat = Image.fromarray(heat_hw.astype(np.float32)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    alpha = OPACITY * np.sqrt(np.asarray(heat, dtype=np.float64))[..., None]
    blended = (1 - alpha) * pixels + alpha * _color(np.asarray(heat))
    return _outlined(Image.fromarray(blended.round().astype(np.uint8)), boxes, image.width)


def draw_boxes(image: Image.Image, boxes: Sequence[Box] = ()) -> Image.Image:
    """The image at the overlay's size, with the boxes alone."""
    return _outlined(_enlarged(image), boxes, image.width)


def _heat(attention_N: np.ndarray, grid: PatchGrid, frame: CanvasFrame) -> np.ndarray:
    """The map at the image's pixels, in [0, 1]: resampled to the whole canvas, then cut to the picture.

    Patches of padding alone give no heat.
    """
    shown_N = coverage([frame.picture], grid)
    even = float((attention_N * shown_N).sum() / shown_N.sum())
    above_N = np.maximum(attention_N / even - 1, 0) * (shown_N > 0) if even > 0 else np.zeros(grid.size)
    scaled = (above_N / max(float(above_N.max()), 1.0)).reshape(grid.rows, grid.columns)
    canvas = Image.fromarray(scaled.astype(np.float32)).resize((frame.side, frame.side), Image.Resampling.BILINEAR)
    picture = canvas.crop((frame.left, frame.top, frame.left + frame.width, frame.top + frame.height))
    return np.asarray(picture)


def _color(heat: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(heat, PLACES, channel) for channel in RAMP.T], axis=-1)


def _enlarged(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    scale = SMALLEST / max(image.size)
    if scale <= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _outlined(image: Image.Image, boxes: Sequence[Box], original_width: int) -> Image.Image:
    image = image.copy()
    scale, draw = image.width / original_width, ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 200))
    for box in boxes:
        x0, y0, x1, y1 = (round(value * scale) for value in box)
        draw.rectangle((x0 - 1, y0 - 1, max(x1, x0), max(y1, y0)), outline=(0, 0, 0), width=width + 2)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=BOX_COLOR, width=width)
    return image
