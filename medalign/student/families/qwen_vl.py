"""Qwen2.5-VL and Qwen3-VL, and the models trained from them, such as Lingshu.

They take images of any size. Here, each image is the square canvas at `student.image_size`, which gives a fixed grid of
k x k tokens, in row-major order. An image token has three positions: time, row and column.

Shape suffixes: B samples, L tokens, T tokens of all samples, I images, C channels, k cells per side, m patches per side
of a cell, p pixels per side of a patch, N = k * k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from medalign.config import StudentConfig
from medalign.contracts import Batch, ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.families.base import Family, ModelSpec
from medalign.student.families.registry import register


class QwenVL(Family):
    """What both generations share."""

    runs_without_data = False  # the tower computes with the values of the grid
    default_image_size: ClassVar[int]

    @override
    def config(self, folder: Path, settings: StudentConfig) -> Any:
        config = super().config(folder, settings)
        size, cell = settings.image_size or self.default_image_size, _cell(config)
        if size % cell:
            raise ConfigError(
                f"student.image_size is {size}, which is not a multiple of {cell}, the pixels per image token of this "
                f"student; set it to {max(1, round(size / cell)) * cell}"
            )
        config.vision_config.image_size = size
        return config

    @override
    def image(self, config: Any) -> ImageTokens:
        side = config.vision_config.image_size // _cell(config)
        return ImageTokens(config.image_token_id, PatchGrid(side, side))

    @override
    def vision_tower(self, model: Any) -> nn.Module:
        visual: nn.Module = model.model.visual
        return visual

    @override
    def projector(self, model: Any) -> nn.Module:
        merger: nn.Module = model.model.visual.merger
        return merger

    @override
    def inputs(self, spec: ModelSpec, batch: Batch, pixels: torch.Tensor | None) -> dict[str, Any]:
        if pixels is None:
            return {}
        types_BL = (batch.image_index >= 0).int()
        return {"mm_token_type_ids": types_BL, **_patches(spec, pixels)}

    def positions(self, spec: ModelSpec, batch: Batch, positions_BL: torch.Tensor) -> torch.Tensor:
        """Return positions in the text, in time, by row and by column, [4, B, L].

        A text token advances all three by one, and an image as a whole by k. A token of the image is as far from its
        start as its row and its column say.
        """
        side, is_image_T = spec.grid.columns, (batch.image_index >= 0).flatten()
        rank_T = is_image_T.long().cumsum(0) - is_image_T.long()  # place among the image tokens
        cell_T = torch.where(is_image_T, rank_T % spec.image.count, 0)
        step_T = torch.where(is_image_T, torch.where(cell_T == 0, side, 0), 1) * batch.attention_mask.flatten()
        before_T = step_T.cumsum(0) - step_T
        first_T = batch.bounds()[batch.sample_of_token().flatten()]
        start_T = before_T - before_T[first_T] - torch.where(cell_T > 0, side, 0)
        axes = (start_T, start_T + cell_T // side, start_T + cell_T % side)
        return torch.stack([positions_BL, *(axis.view_as(positions_BL) for axis in axes)])

    @override
    def features(self, spec: ModelSpec, pixels: torch.Tensor) -> torch.Tensor:
        found = spec.model.get_image_features(**_patches(spec, pixels))
        features_IND = torch.stack(tuple(found.pooler_output))
        # Features that Qwen3-VL adds between blocks: their mergers must be part of the graph, too.
        added = [part.sum() for parts in getattr(found, "deepstack_features", None) or () for part in parts]
        return features_IND + 0 * sum(added) if added else features_IND


@register
class Qwen25VL(QwenVL):
    """Qwen2.5-VL, Lingshu, HuatuoGPT-Vision-7B-Qwen2.5VL."""

    model_type = "qwen2_5_vl"
    default_image_size = 672  # 24 x 24 tokens of 28 pixels, as CLIP ViT-L/14 has at 336


@register
class Qwen3VL(QwenVL):
    """Qwen3-VL: features of several layers of the tower are added to the image tokens after the first blocks."""

    model_type = "qwen3_vl"
    default_image_size = 768  # 24 x 24 tokens of 32 pixels, the size of its table of positions

    @override
    def blank(self, arguments: dict[str, Any], blanked_BL: torch.Tensor) -> dict[str, Any]:
        arguments = super().blank(arguments, blanked_BL)
        places_BL = arguments["visual_pos_masks"]
        kept_T1 = ~blanked_BL[places_BL][:, None]
        added = [features_TD * kept_T1 for features_TD in arguments["deepstack_visual_embeds"]]
        return arguments | {"deepstack_visual_embeds": added}

    @override
    def projector(self, model: Any) -> nn.Module:
        visual = model.model.visual
        return nn.ModuleList([visual.merger, *visual.deepstack_merger_list])


def _cell(config: Any) -> int:
    """Pixels per side of an image token."""
    vision: Any = config.vision_config
    size: int = vision.patch_size * vision.spatial_merge_size
    return size


def _patches(spec: ModelSpec, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut images [I, C, S, S] into patches as the model's own processor does, cell by cell."""
    vision: Any = spec.vision_tower.config
    side, merge, patch = spec.grid.columns, vision.spatial_merge_size, vision.patch_size
    images = len(pixels)
    cells = pixels.reshape(images, -1, side, merge, patch, side, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = cells.unsqueeze(6).expand(*[-1] * 6, vision.temporal_patch_size, -1, -1)  # the image is its own film
    grid = torch.tensor([[1, side * merge, side * merge]] * images, device=pixels.device)
    return {"pixel_values": frames.reshape(images * (side * merge) ** 2, -1), "image_grid_thw": grid}
