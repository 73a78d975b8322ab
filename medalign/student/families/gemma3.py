"""Gemma 3 and MedGemma: the tokens of an image attend to each other in both directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import override

from medalign.contracts import Batch, ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.families.base import Family, ModelSpec
from medalign.student.families.registry import register


@register
class Gemma3(Family):
    """A SigLIP tower whose patches are pooled to a grid, and a decoder with full and sliding attention in turn.

    The chat template writes one marker for an image. The model's own processor replaces it by the image tokens between
    two others, with empty lines around them.
    """

    model_type = "gemma3"
    no_flash = "in Gemma 3 the tokens of an image attend to each other in both directions, for which it needs a mask"
    no_packing = "in Gemma 3 the tokens of an image attend to each other in both directions, which packing would lose"

    @override
    def image(self, config: Any) -> ImageTokens:
        side = math.isqrt(config.mm_tokens_per_image)
        if side**2 != config.mm_tokens_per_image:
            raise ConfigError(
                f"the student's mm_tokens_per_image is {config.mm_tokens_per_image}, which is not the size of a square "
                "grid; correct config.json"
            )
        text = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
        grid = PatchGrid(side, side)
        return ImageTokens(config.image_token_id, grid, marker="<start_of_image>", text=text)

    @override
    def inputs(self, spec: ModelSpec, batch: Batch, pixels: torch.Tensor | None) -> dict[str, Any]:
        # Without token types, the model takes an image for text and says nothing.
        types_BL = (batch.image_index >= 0).long()
        return {**super().inputs(spec, batch, pixels), "token_type_ids": types_BL}
