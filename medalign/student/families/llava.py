"""LLaVA in transformers' format: a vision tower, a projector of two layers, and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from medalign.contracts import ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.families.base import Family, ModelSpec
from medalign.student.families.registry import register
from medalign.student.towers import TOWER_KEYS


@register
class Llava(Family):
    """Models whose every image token is a patch of the vision tower."""

    model_type = "llava"
    features_remedy = (
        "in its config.json, set vision_feature_select_strategy to 'default' for a tower with a class token (CLIP), or "
        "to 'full' for one without (SigLIP)"
    )

    @override
    def claims(self, values: Mapping[str, Any]) -> bool:
        flat = "text_config" not in values and not values.keys().isdisjoint(TOWER_KEYS)  # the layout of LLaVA's authors
        return super().claims(values) and not flat

    @override
    def check(self, folder: Path, values: Mapping[str, Any]) -> None:
        lacking = [part for part in ("text_config", "vision_config") if not values.get(part)]
        if lacking:  # transformers would build a model of 7 billion random weights
            raise ConfigError(
                f"student.path {folder}: its config.json has no {' and no '.join(lacking)}; it is not in the "
                "transformers format (checkpoints from the original LLaVA code are not): convert the model, or use a "
                "converted one (such as those by llava-hf)"
            )

    @override
    def image(self, config: Any) -> ImageTokens:
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, name, None), int):
                raise ConfigError(
                    f"the student's {name} in vision_config is {getattr(vision, name, None)}; only towers with square "
                    "images and patches are supported, whose size is a single integer"
                )
        if strategy != "default" and vision.model_type == "clip_vision_model":
            raise ConfigError(
                f"vision_feature_select_strategy is {strategy!r}, which would include the class token in the image "
                "tokens; set it to 'default' in the student's config.json"
            )
        if vision.image_size % vision.patch_size and vision.model_type != "siglip_vision_model":
            raise ConfigError(
                f"the student's image size {vision.image_size} is not a multiple of its patch size {vision.patch_size}"
            )
        side = vision.image_size // vision.patch_size
        return ImageTokens(config.image_token_id, PatchGrid(side, side))

    def image_size(self, config: Any) -> int:
        """Return the pixels that the patches cover.

        SigLIP at 384 pixels with patches of 14 looks at the first 378 only. The canvas is resized to these, so that the
        grid covers all of it.
        """
        vision = config.vision_config
        size: int = vision.image_size // vision.patch_size * vision.patch_size
        return size

    @override
    def class_attention(self, spec: ModelSpec, block: int) -> tuple[nn.Linear, nn.Linear, int]:
        config = spec.model.config
        if config.vision_feature_select_strategy != "default":
            raise LookupError(f"its vision tower ({config.vision_config.model_type}) has no class token")
        named = list(spec.vision_tower.named_modules())
        queries, keys = ([module for name, module in named if name.endswith(end)] for end in ("q_proj", "k_proj"))
        if len(queries) < -block or len(keys) != len(queries):
            raise LookupError(f"its vision tower has {len(queries)} blocks with projections of queries and keys")
        return queries[block], keys[block], config.vision_config.num_attention_heads

    @override
    def features_settings(self, config: Any) -> str:
        return (
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} and vision_feature_layer "
            f"{config.vision_feature_layer}"
        )
