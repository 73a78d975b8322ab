"""Data types of a phantom study. Reports and answers use the same words as these types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Kind = Literal["nodule", "effusion", "consolidation", "pneumothorax", "cardiomegaly"]
Side = Literal["right", "left", ""]
Zone = Literal["upper", "middle", "lower", ""]
Box = tuple[int, int, int, int]

KINDS: tuple[Kind, ...] = ("nodule", "effusion", "consolidation", "pneumothorax", "cardiomegaly")
SIDES: tuple[Side, ...] = ("right", "left")
ZONES: tuple[Zone, ...] = ("upper", "middle", "lower")


@dataclass(frozen=True)
class Finding:
    """One abnormality and where it is. Cardiomegaly has neither side nor zone."""

    kind: Kind
    side: Side  # of the patient: "right" is on the left of the image
    zone: Zone  # the third of the lung, counted from its apex, that contains the center
    size: str  # "small" or "large"
    box: Box  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive; tight around the mask
    mask: np.ndarray  # [height, width] bool

    @property
    def place(self) -> str:
        """Side and zone in words, or "" without a side."""
        return f"{self.side} {self.zone} zone" if self.side else ""


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the boxes to look at (none if the answer is that nothing is there)."""

    question: str
    answer: str
    answer_type: Literal["closed", "open"]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Study:
    """One synthetic chest radiograph with its ground truth."""

    image: Image.Image  # mode "L"
    findings: list[Finding]
    report: str
    questions: list[Question]
