"""InternVL 3 in transformers' format, with one picture per image: no tiles."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from medalign.contracts import ImageTokens
from medalign.geometry import PatchGrid
from medalign.student.families.base import Family
from medalign.student.families.registry import register


@register
class InternVL(Family):
    """A tower whose patches are merged two by two, in row-major order.

    The model's own processor writes `<img>` and `</img>` around the image tokens of the chat template.
    """

    model_type = "internvl"

    @override
    def image(self, config: Any) -> ImageTokens:
        side = int(self.image_size(config) // _side(config.vision_config.patch_size) * config.downsample_ratio)
        marker = "<IMG_CONTEXT>"
        return ImageTokens(config.image_token_id, PatchGrid(side, side), marker=marker, text=f"<img>{marker}</img>")

    @override
    def image_size(self, config: Any) -> int:
        return _side(config.vision_config.image_size)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    """Height and width are given apart, and equal."""
    return size if isinstance(size, int) else size[0]
