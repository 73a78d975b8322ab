"""Which patches of an image lie in a finding, and which finding it is, from all boxes that samples about it have.

Shape suffixes: N patches, P chosen patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medalign.contracts import Sample
from medalign.evaluation.overlap import Region
from medalign.geometry import CanvasFrame, PatchGrid

PER_IMAGE = 8  # patches inside the boxes of an image, and as many outside
MOST = 0.5  # a patch is inside if the boxes cover at least this share of it


@dataclass
class Film:
    """An image with the boxes of all samples about it, and the class of each box, "" if unknown.

    Attributes:
        place: the index of the first sample about it.
        size: width and height in pixels.
        boxes: x0, y0, x1, y1 in pixels, with the class.
    """

    place: int
    size: tuple[int, int]
    boxes: dict[tuple[float, ...], str] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Add the boxes of a sample about this image.

        The class is the `kind` of a finding with this box in the annotation's list `findings`, or its `finding`. The
        first sample that names one decides.
        """
        kinds = {}
        listed = sample.metadata.get("findings")
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, dict) and isinstance(one.get("box"), list):
                kinds[tuple(map(float, one["box"]))] = str(one.get("kind", ""))
        for box in sample.boxes:
            known = kinds.get(tuple(map(float, box))) or str(sample.metadata.get("finding") or "")
            self.boxes[tuple(box)] = self.boxes.get(tuple(box)) or known


@dataclass(frozen=True)
class Patches:
    """The chosen patches of an image: as many inside the boxes as outside.

    Attributes:
        places: [P] int64, row-major on the grid.
        inside: [P] bool.
        classes: [P] the finding of each patch; "" outside, and where none or several are known.
    """

    places: np.ndarray
    inside: np.ndarray
    classes: np.ndarray


def choose_patches(film: Film, grid: PatchGrid) -> Patches:
    """Draw patches of an image, depending on its place only. There are none if all or no patches are inside.

    Patches that the boxes touch but hardly cover, and those with padding, are neither inside nor outside.
    """
    frame = CanvasFrame(*film.size)
    region = Region.of_boxes(list(film.boxes), frame, grid)
    whole_N = region.picture_N > 1 - 1e-6
    inside = np.flatnonzero(whole_N & (region.inside_N >= MOST))
    outside = np.flatnonzero(whole_N & (region.inside_N == 0))
    count = min(PER_IMAGE, len(inside), len(outside))
    draw = np.random.default_rng(film.place)
    drawn = np.sort(draw.choice(inside, count, False)), np.sort(draw.choice(outside, count, False))
    places = np.concatenate(drawn)
    return Patches(places, np.arange(2 * count) < count, _classes(film, frame, grid)[places])


def _classes(film: Film, frame: CanvasFrame, grid: PatchGrid) -> np.ndarray:
    """Return the only class whose boxes cover most of each patch, [N] of text."""
    found: list[Sequence[str]] = [()] * grid.size
    for name in sorted(set(film.boxes.values())):
        own = [box for box, known in film.boxes.items() if known == name]
        for patch in np.flatnonzero(Region.of_boxes(own, frame, grid).inside_N >= MOST):
            found[patch] = (*found[patch], name)
    return np.array([names[0] if len(names) == 1 else "" for names in found], dtype=object)
