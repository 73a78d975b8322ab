"""LLaVA-NeXT and LLaVA-OneVision, such as RadVLM: an image is seen as a whole and again in tiles.

The models take tiles in many arrangements. Here, each image is the square canvas in 2 x 2 tiles, so the number of image
tokens is fixed: those of the whole picture, then the rows of the tiles, each with a token at its end. The tokens of the
tiles are the cells of the grid. The others only accompany them.

Shape suffixes: I images, C channels, S pixels per side of the canvas, s pixels per side of a tile, V views (the whole
and the tiles).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from medalign.contracts import Batch, ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.families.base import ModelSpec
from medalign.student.families.llava import Llava, resized_features
from medalign.student.families.registry import register

_TILES = 2  # per side


@register
class LlavaNext(Llava):
    """Several images of a sample are tiled each."""

    model_type = "llava_next"

    @override
    def image(self, config: Any) -> ImageTokens:
        tile = super().image(config)
        size = _TILES * config.vision_config.image_size
        if [size, size] not in [list(shape) for shape in config.image_grid_pinpoints]:
            raise ConfigError(
                f"the student's image_grid_pinpoints do not contain [{size}, {size}], the {_TILES} x {_TILES} tiles in "
                "which it would see an image; only students with this arrangement are supported"
            )
        side = _TILES * tile.grid.columns
        row = (True,) * side + (False,)  # cells, and the end of the line
        return ImageTokens(tile.token_id, PatchGrid(side, side), cells=(False,) * tile.grid.size + row * side)

    @override
    def class_attention(self, spec: ModelSpec, block: int) -> tuple[nn.Linear, nn.Linear, int]:
        raise LookupError("its vision tower sees an image as a whole and in tiles, each with a class token")

    @override
    def scaled_features(self, spec: Any, pixels: torch.Tensor, scales: int) -> Iterator[torch.Tensor]:
        """The tiles are the last scale, the image as a whole the one before."""
        whole = _views(spec, pixels)["pixel_values"][:, 0]
        for step in range(scales - 2, -1, -1):
            yield resized_features(spec, whole, 2**step)
        yield self.features(spec, pixels)[:, list(spec.image.cells)]

    @override
    def image_size(self, config: Any) -> int:
        return _TILES * super().image_size(config)

    @override
    def inputs(self, spec: Any, batch: Batch, pixels: torch.Tensor | None) -> dict[str, Any]:
        return {} if pixels is None else _views(spec, pixels)

    @override
    def features(self, spec: Any, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack(tuple(spec.model.get_image_features(**_views(spec, pixels)).pooler_output))


@register
class LlavaOneVision(LlavaNext):
    """With several images in a sample, the model was trained without tiles, so a sample has one image here."""

    model_type = "llava_onevision"
    max_images = 1


def _views(spec: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut images [I, C, S, S] into views [I, V, C, s, s], and say how large they are.

    The whole picture is made from the canvas as the model's own processor does, which also rounds and clips to 8 bits.
    """
    images, channels, size, _ = pixels.shape
    tile = size // _TILES
    whole = F.interpolate(pixels.float(), (tile, tile), mode="bicubic", antialias=True).to(pixels.dtype)
    grid = pixels.reshape(images, channels, _TILES, tile, _TILES, tile).permute(0, 2, 4, 1, 3, 5)
    full = _TILES * spec.model.config.vision_config.image_size  # selects the arrangement of tiles
    sizes = torch.tensor([[full, full]] * images)
    return {"pixel_values": torch.cat([whole[:, None], grid.flatten(1, 2)], dim=1), "image_sizes": sizes}
