"""How well a map over patches separates a region from the rest of the image: average precision and IoU.

A patch counts with the area of the image that it shows, and inside the region with the area that the region covers.
Padding does not count. A map that is the same everywhere scores exactly the share of the image that the region covers,
in both measures.

Shape suffixes: N patches, G groups of patches with equal values, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medalign.geometry import Box, CanvasFrame, PatchGrid, coverage

THRESHOLDS = np.arange(100) / 100  # of the largest value of a map


@dataclass(frozen=True)
class Region:
    """A region of an image on a grid.

    Attributes:
        inside_N: share of each patch that the region covers, without padding, in [0, 1].
        picture_N: share of each patch that shows the image.
    """

    inside_N: np.ndarray
    picture_N: np.ndarray

    @classmethod
    def of_boxes(cls, boxes: Sequence[Box], frame: CanvasFrame, grid: PatchGrid) -> Region:
        """Return the union of boxes, which are in pixels of the image; what is outside of it does not count."""
        picture_N = coverage([frame.picture], grid)
        clipped = [box for box in map(frame.clip, boxes) if box[0] < box[2] and box[1] < box[3]]
        return cls(np.minimum(coverage([frame.to_unit(box) for box in clipped], grid), picture_N), picture_N)

    @classmethod
    def of_mask(cls, mask: Image.Image, grid: PatchGrid) -> Region:
        """Return the pixels of a mask of the image's size that are not zero, and not transparent."""
        frame = CanvasFrame(*mask.size)
        bands = np.asarray(mask).reshape(mask.height, mask.width, -1) > 0
        colors = [place for place, name in enumerate(mask.getbands()) if name != "A"]
        inside = bands[..., colors].any(-1) & (bands[..., -1] if "A" in mask.getbands() else True)
        canvas = np.zeros((frame.side, frame.side))
        canvas[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = inside
        sums = _patch_sums(_patch_sums(canvas, grid.rows).T, grid.columns).T
        picture_N = coverage([frame.picture], grid)
        return cls(np.minimum(sums.reshape(-1) * grid.size / frame.side**2, picture_N), picture_N)

    @property
    def area(self) -> float:
        """Share of the image that the region covers: what a uniform map scores."""
        return float(self.inside_N.sum() / self.picture_N.sum())

    def share(self, map_N: np.ndarray) -> float:
        """Return the share of a map that is inside, without what is on padding; 0 if all of it is on padding."""
        total = float((map_N * self.picture_N).sum())
        return float((map_N * self.inside_N).sum()) / total if total else 0.0


def average_precision(map_N: np.ndarray, region: Region) -> float:
    """Return the average precision of the order that the map gives to the patches, in [0, 1].

    It is the sum of precision times the increase of recall, without interpolation, as scikit-learn computes it. Patches
    with equal values enter together.

    Args:
        map_N: one value per patch.
        region: not empty.
    """
    visible_N = region.picture_N > 0
    _, group_N = np.unique(-map_N[visible_N], return_inverse=True)
    inside_G = np.bincount(group_N, region.inside_N[visible_N]).cumsum()
    chosen_G = np.bincount(group_N, region.picture_N[visible_N]).cumsum()
    recall_G = inside_G / inside_G[-1]
    return float((np.diff(recall_G, prepend=0.0) * inside_G / chosen_G).sum())


def ious(map_N: np.ndarray, region: Region) -> np.ndarray:
    """Return the IoU of the region and the patches whose value reaches a share of the largest one, [T].

    Args:
        map_N: values that are not negative.
        region: not empty.
    """
    visible_N = region.picture_N > 0
    values_N = map_N[visible_N]
    chosen_TN = values_N >= THRESHOLDS[:, None] * values_N.max()
    both_T = chosen_TN @ region.inside_N[visible_N]
    either_T = chosen_TN @ region.picture_N[visible_N] + region.inside_N.sum() - both_T
    result: np.ndarray = both_T / either_T
    return result


def _patch_sums(values: np.ndarray, patches: int) -> np.ndarray:
    """Return the sums of rows of pixels over `patches` equal parts; a pixel between two parts is divided."""
    before = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
    places = np.linspace(0, len(values), patches + 1)
    low = np.minimum(places.astype(int), len(values) - 1)
    share = (places - low)[:, None]
    return np.diff(before[low] * (1 - share) + before[low + 1] * share, axis=0)
