"""Attention maps as overlays on images.

Shape suffixes: N patches, h and w height and width of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from medalign.geometry import Box, CanvasFrame, PatchGrid, coverage

MIN_SIDE = 384  # pixels of the longer side; smaller images are enlarged to it
OPACITY = 0.72  # of the largest attention
BOX_COLOR = (88, 230, 178)
# Colors of the overlay, from uniform attention (transparent) to the largest attention; also readable in grayscale.
RAMP = np.array([(52, 12, 95), (150, 32, 110), (232, 88, 48), (250, 168, 38), (255, 240, 150)], dtype=np.float64)
PLACES = np.array([0.0, 0.35, 0.65, 0.85, 1.0])


def overlay(
    image: Image.Image,
    attention_N: np.ndarray | torch.Tensor | Sequence[float],
    grid: PatchGrid,
    boxes: Sequence[Box] = (),
) -> Image.Image:
    """Draw attention as a heat map, and boxes as outlines, on an image.

    The heat map starts where a patch gets more attention than it would if attention were uniform over the image. It
    is at its maximum at the patch with the largest attention, but at no less than twice the uniform attention, so a
    flat map remains pale.

    Args:
        image: the image.
        attention_N: attention on `grid`, of any positive scale.
        grid: patches of the square canvas around the image.
        boxes: x0, y0, x1, y1 in pixels of the image.

    Returns:
        An RGB image whose longer side has at least `MIN_SIDE` pixels.
    """
    heat_hw = _heat(np.asarray(attention_N, dtype=np.float64), grid, CanvasFrame(*image.size))
    pixels = np.asarray(_enlarged(image), dtype=np.float64)
    heat = Image.fromarray(heat_hw.astype(np.float32)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    alpha = OPACITY * np.sqrt(np.asarray(heat, dtype=np.float64))[..., None]
    blended = (1 - alpha) * pixels + alpha * _color(np.asarray(heat))
    return _outlined(Image.fromarray(blended.round().astype(np.uint8)), boxes, image.width)


def draw_boxes(image: Image.Image, boxes: Sequence[Box] = ()) -> Image.Image:
    """Draw only the boxes (in pixels of the image) on an image, at the size of the overlay."""
    return _outlined(_enlarged(image), boxes, image.width)


def _heat(attention_N: np.ndarray, grid: PatchGrid, frame: CanvasFrame) -> np.ndarray:
    """Resample the attention to the canvas and crop it to the image. The result is in [0, 1].

    Patches that show only padding count as zero.
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
    scale = MIN_SIDE / max(image.size)
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
