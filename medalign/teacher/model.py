"""The teacher: how it takes its pixels, what it gives for an image, and what becomes of that as a target.

Shape suffixes: I images, T pixels per side, M patches, b the tower's width, F findings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from medalign.geometry import PIXELS, PatchGrid, PreprocessCfg
from medalign.teacher.conditioning import TextConditioning
from medalign.teacher.rollout import Rollout
from medalign.teacher.sinks import mask_outliers
from medalign.teacher.towers import ClassTokenTower, Streams, TextAlignedTower, Tower

FEATURES, ATTENTION, NORMS, RELEVANCE = "features", "attention", "norms", "relevance"
Inputs: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor]  # normalized pixels, or what a teacher reads by name


def by_name(inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """Return what a teacher reads by name; a tensor is pixels."""
    return {PIXELS: inputs} if isinstance(inputs, torch.Tensor) else inputs


class TargetSource(nn.Module, ABC):
    """What gives the targets of images: a tower that runs (`Teacher`), or what one gave before (`CachedTeacher`).

    Args:
        preprocess_cfg: how it takes its pixels.
        grid: its patches.
        width: b, number of features per patch.
        conditioning: makes the attention follow the question; None takes the class token's or the pooling head's.
        mask_sinks: patches whose norm is larger than this multiple of the image's median get no attention; 0 is off.
    """

    def __init__(
        self,
        preprocess_cfg: PreprocessCfg,
        grid: PatchGrid,
        width: int,
        conditioning: TextConditioning | None,
        mask_sinks: float,
    ) -> None:
        super().__init__()
        self.preprocess_cfg = preprocess_cfg
        self.grid = grid
        self.width = width
        self.conditioning = conditioning
        self.mask_sinks = mask_sinks

    def train(self, mode: bool = True) -> TargetSource:
        """Do nothing: the teacher stays in eval mode."""
        return self

    @property
    @abstractmethod
    def view(self) -> Any:
        """What the collator reads of a canvas for it: a `TeacherView`."""

    @abstractmethod
    def observe(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what the teacher sees in images, whatever the question.

        Args:
            inputs: what it reads of I images, by name (`Batch.teachers`).

        Returns:
            `features` [I, M, b]; from a tower with attention also `attention` [I, M] and `norms` [I, M] of the patches,
            both in float32; and with conditioning `relevance` [I, M, 2 F] (see `TextConditioning`).
        """

    def forward(
        self, inputs: Inputs, questions: Sequence[str] = (), reports: Sequence[str] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give patch features and the attention target of images, in one pass.

        Args:
            inputs: normalized pixels [I, 3, T, T], or what the teacher reads by name.
            questions: the question about each image; used only if the attention follows the question.
            reports: the report of each image, empty for other tasks; used only if it follows reports too.

        Returns:
            Features [I, M, b], and attention [I, M] in float32; None for a tower that has no attention.
        """
        return self.finish(self.observe(by_name(inputs)), questions, reports)

    def finish(
        self, seen: Mapping[str, torch.Tensor], questions: Sequence[str] = (), reports: Sequence[str] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn what `observe` returns into features and the attention target; see `forward`."""
        if ATTENTION not in seen:
            return seen[FEATURES], None
        attention = seen[ATTENTION]
        if self.conditioning is not None:
            attention = self.conditioning(attention, seen[RELEVANCE], questions, reports)
        if self.mask_sinks:
            attention = mask_outliers(attention, seen[NORMS], self.mask_sinks)
        return seen[FEATURES], attention


class Teacher(TargetSource):
    """A frozen vision tower and its preprocessing.

    Args:
        tower: the vision tower.
        mean: per-channel mean for the normalization of pixels in [0, 1].
        std: per-channel standard deviation.
        conditioning: makes the attention follow the question; None takes the class token's or the pooling head's.
        mask_sinks: patches whose norm is larger than this multiple of the image's median get no attention; 0 is off.
        compile_tower: compile the tower with torch.compile at its first run.
        rollout: take the class token's attention through all blocks. The tower must be a `ClassTokenTower`.
    """

    def __init__(
        self,
        tower: Tower,
        mean: Sequence[float],
        std: Sequence[float],
        conditioning: TextConditioning | None = None,
        mask_sinks: float = 0.0,
        compile_tower: bool = False,
        rollout: bool = False,
    ) -> None:
        preprocess = PreprocessCfg(tower.image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        super().__init__(preprocess, tower.grid, tower.width, conditioning, mask_sinks)
        self.tower = tower
        self.rollout = rollout
        self.encode = torch.compile(tower.encode) if compile_tower else tower.encode
        self.requires_grad_(False)
        nn.Module.train(self, False)

    @property
    def view(self) -> PreprocessCfg:
        """The pixels of a canvas."""
        return self.preprocess_cfg

    def observe(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the tower once on normalized pixels [I, 3, T, T]."""
        streams, attention = self._run(inputs[PIXELS].to(next(self.tower.parameters()).dtype))
        seen = {FEATURES: self.tower.features(streams)}
        if attention is not None:
            norms = torch.linalg.vector_norm(streams.after.float(), dim=-1)
            seen |= {ATTENTION: attention, NORMS: norms}
        if self.conditioning is not None:
            assert isinstance(self.tower, TextAlignedTower)
            seen[RELEVANCE] = self.conditioning.relevance(self.tower.values(streams))
        return seen

    def _run(self, pixels: torch.Tensor) -> tuple[Streams, torch.Tensor | None]:
        """Run the tower, and compute its attention to the patches, [I, M] in float32."""
        if not self.rollout:
            streams = self.encode(pixels)
            return streams, self.tower.attention(streams)
        assert isinstance(self.tower, ClassTokenTower)
        with Rollout(self.tower) as rollout:
            streams = self.encode(pixels)
        return streams, rollout.attention()
