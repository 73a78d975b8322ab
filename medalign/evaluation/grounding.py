"""Grounding scores: how much of the question's attention is on the finding.

The attention of the question's tokens at the tapped block, averaged over heads and tokens, is a saliency map. It does
not show whether the student follows the question, or whether the answer depends on the attended region.

All scores refer to the image without the padding that makes it square. Attention to padding is removed before the
attention is normalized, and the area of the padding does not count. Attention that is uniform over the image then
scores exactly the fraction of the image that the boxes cover, which is therefore the chance level. A student does not
gain by merely ignoring the padding.

Shape suffixes: N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medalign.geometry import Box, CanvasFrame, PatchGrid, coverage


@dataclass(frozen=True)
class Grounding:
    """Grounding scores of one attention map. Fractions refer to the image without padding and are in [0, 1]."""

    inside: float  # fraction of the attention inside the boxes; 0 if all attention is on padding
    area: float  # fraction of the image that the boxes cover
    hit: bool  # pointing game: whether the patch with the largest attention is a hit
    chance: float  # fraction of the patches that are hits


def grounding(
    attention_N: np.ndarray | torch.Tensor | Sequence[float],
    boxes: Sequence[Box],
    frame: CanvasFrame,
    grid: PatchGrid,
) -> Grounding | None:
    """Compare a question's attention with boxes.

    The boxes count as their union, clipped to the image. A patch that is partly inside counts in proportion. The
    pointing game uses the patch with the largest attention (the first one of several) that shows a part of the image.

    Args:
        attention_N: attention of any positive scale.
        boxes: x0, y0, x1, y1 in pixels of the image.
        frame: position of the image on the square canvas.
        grid: the patches of the canvas.

    Returns:
        The scores, or None if no box covers any part of the image.

    Raises:
        ValueError: the attention has another size, or a value is negative or not finite.
    """
    attention_N = check_map(attention_N, grid)
    clipped = [frame.clip(box) for box in boxes]
    unit_boxes = [frame.to_unit(box) for box in clipped if box[0] < box[2] and box[1] < box[3]]
    picture_N = coverage([frame.picture], grid)
    boxes_N = np.minimum(coverage(unit_boxes, grid), picture_N)
    if not boxes_N.any():
        return None
    visible_N = picture_N > 0
    hits_N = patches_hit(unit_boxes, grid) & visible_N
    total = float((attention_N * picture_N).sum())
    return Grounding(
        inside=float((attention_N * boxes_N).sum()) / total if total else 0.0,
        area=float(boxes_N.sum() / picture_N.sum()),
        hit=bool(hits_N[np.argmax(np.where(visible_N, attention_N, -1.0))]),
        chance=float(hits_N.sum() / visible_N.sum()),
    )


def check_map(attention: np.ndarray | torch.Tensor | Sequence[float], grid: PatchGrid) -> np.ndarray:
    """Return a map as float64 [N]. Raises ValueError if its size is another one or a value is not valid."""
    if isinstance(attention, torch.Tensor):
        attention = attention.detach().double().cpu().numpy()
    attention_N = np.asarray(attention, dtype=np.float64)
    if attention_N.shape != (grid.size,):
        raise ValueError(f"attention has shape {attention_N.shape}, but the grid is {grid.rows} x {grid.columns}")
    if not np.isfinite(attention_N).all() or (attention_N < 0).any():
        raise ValueError("attention must be finite and not negative")
    return attention_N


def patches_hit(unit_boxes: Sequence[tuple[float, float, float, float]], grid: PatchGrid) -> np.ndarray:
    """Return which patches are hits, [N] bool.

    A patch is a hit if its center is inside a box, or if it contains the center of a box, which may be smaller than a
    patch.
    """
    y = (np.arange(grid.rows) + 0.5) / grid.rows
    x = (np.arange(grid.columns) + 0.5) / grid.columns
    hits = np.zeros((grid.rows, grid.columns), dtype=bool)
    for x0, y0, x1, y1 in unit_boxes:
        hits |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
        row, column = int((y0 + y1) / 2 * grid.rows), int((x0 + x1) / 2 * grid.columns)
        hits[min(row, grid.rows - 1), min(column, grid.columns - 1)] = True
    return hits.reshape(-1)
