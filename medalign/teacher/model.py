"""The teacher: a frozen vision tower, how it takes its pixels, and whether its attention follows the question.

Shape suffixes: I images, T pixels per side, M patches, b the tower's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.teacher.conditioning import TextConditioning
from medalign.teacher.sinks import mask_outliers
from medalign.teacher.towers import TextAlignedTower, Tower


class Teacher(nn.Module):
    """A frozen vision tower and its preprocessing.

    Args:
        tower: the vision tower.
        mean: per-channel mean for the normalization of pixels in [0, 1].
        std: per-channel standard deviation.
        conditioning: makes the attention follow the question; None takes the class token's or the pooling head's.
        mask_sinks: patches whose norm is larger than this multiple of the image's median get no attention; 0 is off.
        compile_tower: compile the tower with torch.compile at its first run.
    """

    def __init__(
        self,
        tower: Tower,
        mean: Sequence[float],
        std: Sequence[float],
        conditioning: TextConditioning | None = None,
        mask_sinks: float = 0.0,
        compile_tower: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.conditioning = conditioning
        self.mask_sinks = mask_sinks
        self.encode = torch.compile(tower.encode) if compile_tower else tower.encode
        self.preprocess_cfg = PreprocessCfg(tower.image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        self.requires_grad_(False)
        super().train(False)

    @property
    def grid(self) -> PatchGrid:
        """The tower's patches."""
        return self.tower.grid

    @property
    def width(self) -> int:
        """Number of features per patch."""
        return self.tower.width

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: the teacher stays in eval mode."""
        return self

    def forward(self, pixels: torch.Tensor, questions: Sequence[str] = ()) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute patch features of the last layer and the attention target, in one pass.

        Args:
            pixels: normalized, [I, 3, T, T].
            questions: the question about each image; used only if the attention follows the question.

        Returns:
            Features [I, M, b], and attention [I, M] in float32; None for a tower that has no attention.
        """
        streams = self.encode(pixels.to(next(self.parameters()).dtype))
        features, attention = self.tower.features(streams), self.tower.attention(streams)
        if self.conditioning is not None and attention is not None:
            assert isinstance(self.tower, TextAlignedTower)
            attention = self.conditioning(attention, self.tower.values(streams), questions)
        if self.mask_sinks and attention is not None:
            attention = mask_outliers(attention, streams.after, self.mask_sinks)
        return features, attention
