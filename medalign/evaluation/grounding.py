"""How much of the question's attention lies on the finding?

The attention is that of the question's tokens at the tapped block, mean over heads and tokens: a saliency map. It does
not tell whether the student follows the question, nor whether its answer depends on where the attention lies.

Everything is measured on the picture alone, without the padding that makes it square: attention on padding is left
out before it is normalized, and so is the padding's ground. Attention spread evenly over the picture then scores
exactly the boxes' share of it, so the share is what chance gives; and a student gains nothing by merely ignoring
the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medalign.geometry import Box, CanvasFrame, PatchGrid, coverage


@dataclass(frozen=True)
class Grounding:
    """How one attention map lies on the boxes of one image. Shares are of the picture, in [0, 1]."""

    inside: float  # share of the attention inside the boxes; 0 where all attention lies on padding
    area: float  # share of the ground that the boxes cover
    hit: bool  # pointing game: the strongest patch points at a box
    chance: float  # share of the patches that would be hits


def grounding(
    attention_N: np.ndarray | torch.Tensor | Sequence[float],
    boxes: Sequence[Box],
    frame: CanvasFrame,
    grid: PatchGrid,
) -> Grounding | None:
    """Compare a question's attention, N values of any positive scale, with boxes in image pixels.

    None where no box covers any of the picture: no score would be fair.

    The boxes count as their union, cut to the picture; a patch that is partly inside counts in proportion. A patch
    is a hit where its center lies in a box, or where it holds the center of a box (which may be smaller than a
    patch, and lie between centers). The strongest patch is the first one of largest attention among those that
    show some of the picture.

    Raises ValueError for a map of another size, and values that are negative or not finite.
    """
    attention_N = _checked(attention_N, grid)
    cut = [_cut(box, frame) for box in boxes]
    unit_boxes = [frame.to_unit(box) for box in cut if box[0] < box[2] and box[1] < box[3]]
    picture_N = coverage([frame.picture], grid)
    boxes_N = np.minimum(coverage(unit_boxes, grid), picture_N)
    if not boxes_N.any():
        return None
    visible_N = picture_N > 0
    hits_N = _hits(unit_boxes, grid) & visible_N
    total = float((attention_N * picture_N).sum())
    return Grounding(
        inside=float((attention_N * boxes_N).sum()) / total if total else 0.0,
        area=float(boxes_N.sum() / picture_N.sum()),
        hit=bool(hits_N[np.argmax(np.where(visible_N, attention_N, -1.0))]),
        chance=float(hits_N.sum() / visible_N.sum()),
    )


def _checked(attention: np.ndarray | torch.Tensor | Sequence[float], grid: PatchGrid) -> np.ndarray:
    if isinstance(attention, torch.Tensor):
        attention = attention.detach().double().cpu().numpy()
    attention_N = np.asarray(attention, dtype=np.float64)
    if attention_N.shape != (grid.size,):
        raise ValueError(f"attention of shape {attention_N.shape} on a grid of {grid.rows} x {grid.columns}")
    if not np.isfinite(attention_N).all() or (attention_N < 0).any():
        raise ValueError("attention must be finite and not negative")
    return attention_N


def _cut(box: Box, frame: CanvasFrame) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(frame.width)), min(y1, float(frame.height))


def _hits(unit_boxes: Sequence[tuple[float, float, float, float]], grid: PatchGrid) -> np.ndarray:
    """Which patches point at a box, [N] bool."""
    y = (np.arange(grid.rows) + 0.5) / grid.rows
    x = (np.arange(grid.columns) + 0.5) / grid.columns
    hits = np.zeros((grid.rows, grid.columns), dtype=bool)
    for x0, y0, x1, y1 in unit_boxes:
        hits |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
        row, column = int((y0 + y1) / 2 * grid.rows), int((x0 + x1) / 2 * grid.columns)
        hits[min(row, grid.rows - 1), min(column, grid.columns - 1)] = True
    return hits.reshape(-1)
