"""LLaVA in transformers' format: a vision tower, a projector of two layers, and a decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from medalign.contracts import ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.families.base import Family, ModelSpec, PatchAttention
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
        projections = _projections(spec.vision_tower)
        if len(projections) < -block:
            raise LookupError(f"its vision tower has {len(projections)} blocks with projections of queries and keys")
        return *projections[block], config.vision_config.num_attention_heads

    @override
    def patch_attention(self, spec: ModelSpec) -> PatchAttention:
        config, projections = spec.model.config, _projections(spec.vision_tower)
        if not projections or _embeddings(spec.vision_tower) is None:
            raise LookupError(f"its vision tower ({config.vision_config.model_type}) takes images of one size only")
        layers = config.vision_feature_layer  # of the hidden states: 0 is before the first block
        states = range(len(projections) + 1)
        last = max(states[layer] for layer in ([layers] if isinstance(layers, int) else layers))
        first = int(config.vision_feature_select_strategy == "default")
        return PatchAttention(projections[:last], config.vision_config.num_attention_heads, first)

    @override
    def scaled_features(self, spec: ModelSpec, pixels: torch.Tensor, scales: int) -> Iterator[torch.Tensor]:
        for step in range(scales - 1, 0, -1):
            yield resized_features(spec, pixels, 2**step)
        yield self.features(spec, pixels)

    @override
    def features_settings(self, config: Any) -> str:
        return (
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} and vision_feature_layer "
            f"{config.vision_feature_layer}"
        )


def resized_features(spec: ModelSpec, pixels: torch.Tensor, divisor: int) -> torch.Tensor:
    """Return the features of images whose sides are divided by a number, [I, N, D].

    Their position embeddings are interpolated, bilinearly as the pixels.

    Args:
        spec: the model.
        pixels: [I, 3, S, S], of the tower's own size.
        divisor: of S.
    """
    config, tower = spec.model.config, spec.vision_tower
    embeddings: Any = _embeddings(tower)
    size = pixels.shape[-1] // divisor
    small = F.interpolate(pixels.float(), (size, size), mode="bilinear", align_corners=False).to(pixels.dtype)
    side = size // config.vision_config.patch_size
    # Hides the method of the class, which is bicubic; some towers call it only if they are asked to.
    embeddings.interpolate_pos_encoding = lambda *_: _resized_positions(embeddings, side)
    asked = "interpolate_pos_encoding" in signature(embeddings.forward).parameters
    try:
        extra = {"interpolate_pos_encoding": True} if asked else {}
        states = tower(small, output_hidden_states=True, **extra).hidden_states
    finally:
        del embeddings.interpolate_pos_encoding
    layers = config.vision_feature_layer
    chosen = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    features: torch.Tensor = spec.projector(chosen[:, -(side**2) :])
    return features


def _projections(tower: nn.Module) -> list[tuple[Any, Any]]:
    """Return the projections of queries and keys of each block; none if they are not apart."""
    named = list(tower.named_modules())
    queries, keys = ([module for name, module in named if name.endswith(end)] for end in ("q_proj", "k_proj"))
    return list(zip(queries, keys, strict=True)) if len(queries) == len(keys) else []


def _embeddings(tower: nn.Module) -> nn.Module | None:
    """Return the module that adds a position embedding to each patch, and can interpolate it; None if there is none."""
    return next((module for module in tower.modules() if hasattr(module, "interpolate_pos_encoding")), None)


def _resized_positions(embeddings: Any, side: int) -> torch.Tensor:
    """Return the position embeddings of a square grid, [1, N, D]; those of tokens before the patches are kept."""
    if hasattr(embeddings, "position_embedding"):  # CLIP, SigLIP
        table_ND = embeddings.position_embedding.weight
    else:  # DINOv2
        table_ND = embeddings.position_embeddings[0]
    own = math.isqrt(len(table_ND))
    first_FD, patches_ND = table_ND.split([len(table_ND) - own**2, own**2])
    grid_DYX = patches_ND.T.unflatten(1, (own, own)).float()
    resized_DYX = F.interpolate(grid_DYX[None], (side, side), mode="bilinear", align_corners=False)[0]
    return torch.cat([first_FD, resized_DYX.flatten(1).T.to(table_ND.dtype)])[None]
