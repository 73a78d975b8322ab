"""What `medalign ground` measures of each sample, and the summary over samples.

The summary has these parts. Each image counts once, with the mean over its questions, and intervals are those of
resampled images.

| part | meaning |
| --- | --- |
| question, answer | maps of the question's tokens, and of the rows that predict the student's answer, against boxes |
| question_mask, answer_mask | the same against masks, if samples have them |
| heads | for every block and head, the share of its map inside the boxes, and its attention to the image at all |
| removal | deletion and insertion in the order of the question's map, beside a random order |

Shape suffixes: N patches, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from medalign.evaluation.grounding import grounding
from medalign.evaluation.metrics.intervals import mean
from medalign.evaluation.metrics.localization import Case, localization
from medalign.evaluation.overlap import Region
from medalign.evaluation.patch_removal import Curves, mean_curves
from medalign.geometry import CanvasFrame, PatchGrid

KINDS = ("question", "answer")  # of rows; an answer without text has no maps
Heads = list[list[float]]  # [blocks][heads]


@dataclass
class Grounded:
    """The measurements of one sample, whose boxes cover a part of its first image."""

    key: str
    image: str  # digest of the images' pixels
    image_size: tuple[int, int]  # width, height of the first image
    boxes: list[list[float]]
    mask: list[float] | None  # share of each patch inside the mask, or None
    maps: dict[str, list[float]]  # kind -> the map of the tapped block, N values
    inside: dict[str, Heads]  # kind -> share of each head's map inside the boxes
    on_image: dict[str, Heads]  # kind -> share of each head's attention on the cells of the first image
    removal: dict[str, float] | None  # fields of `Curves`; None for an answer without text

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Grounded:
        """Return the sample that a line of JSON describes. Raises KeyError if it lacks a field."""
        return cls(**{item.name: values[item.name] for item in fields(cls)})


def head_shares(map_NH: np.ndarray, region: Region) -> tuple[list[float], list[float]]:
    """Return the share of each head's map inside a region, and the sum of its map, [H] each."""
    return [region.share(map_N) for map_N in map_NH.T], map_NH.sum(0).tolist()


def summarize(records: Sequence[Grounded], grid: PatchGrid) -> dict[str, Any]:
    """Return the summary; see the table above.

    Args:
        records: at least one.
        grid: the student's grid.
    """
    found: dict[str, Any] = {
        "n": len(records),
        "images": len({one.image for one in records}),
        "answers_empty": sum(one.removal is None for one in records),
        "masks": sum(one.mask is not None for one in records),
    }
    for kind in KINDS:
        having = [one for one in records if kind in one.maps]
        found[kind] = _against_boxes(having, kind, grid)
        found[f"{kind}_mask"] = _against_masks([one for one in having if one.mask is not None], kind, grid)
        if having:
            found.setdefault("heads", {})[kind] = _heads(having, kind)
    answered = [one for one in records if one.removal is not None]
    curves = mean_curves([Curves(**one.removal) for one in answered if one.removal is not None])
    images = [one.image for one in answered]
    found["removal"] = {
        name: value for part, values in curves.items() for name, value in mean(part, values, images).items()
    }
    return {name: value for name, value in found.items() if value not in ({}, None)}


def _against_boxes(records: Sequence[Grounded], kind: str, grid: PatchGrid) -> dict[str, float]:
    frames = [CanvasFrame(*one.image_size) for one in records]
    scored = [grounding(one.maps[kind], one.boxes, frame, grid) for one, frame in zip(records, frames, strict=True)]
    cases: list[Case] = [
        (np.array(one.maps[kind]), Region.of_boxes(one.boxes, frame, grid))
        for one, frame in zip(records, frames, strict=True)
    ]
    images = [one.image for one in records]
    known = [(one, image) for one, image in zip(scored, images, strict=True) if one is not None]
    owners = [image for _, image in known]
    scores = mean("pointing_hits", [one.hit for one, _ in known], owners)
    if known:
        scores["pointing_chance"] = mean("chance", [one.chance for one, _ in known], owners)["chance"]
    return _shares(cases, images) | scores | localization("box", cases, images)


def _against_masks(records: Sequence[Grounded], kind: str, grid: PatchGrid) -> dict[str, float]:
    pictures = [Region.of_boxes([], CanvasFrame(*one.image_size), grid).picture_N for one in records]
    cases: list[Case] = [
        (np.array(one.maps[kind]), Region(np.array(one.mask), picture_N))
        for one, picture_N in zip(records, pictures, strict=True)
    ]
    images = [one.image for one in records]
    return _shares(cases, images) | localization("mask", cases, images)


def _shares(cases: Sequence[Case], images: Sequence[str]) -> dict[str, float]:
    scores = mean("inside", [region.share(map_N) for map_N, region in cases], images)
    if cases:
        scores["inside_uniform"] = mean("area", [region.area for _, region in cases], images)["area"]
    return scores


def _heads(records: Sequence[Grounded], kind: str) -> dict[str, Heads]:
    """Return the means over images of what each head of each block has, [blocks][heads]."""
    _, group = np.unique([one.image for one in records], return_inverse=True)
    weights = 1 / np.bincount(group)[group] / (group.max() + 1)
    return {
        name: np.einsum("s,s...->...", weights, np.array([getattr(one, name)[kind] for one in records])).tolist()
        for name in ("inside", "on_image")
    }
