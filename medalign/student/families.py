"""Where things are in a model: decoder blocks, vision tower, projector, image tokens.

One family for now: LLaVA-class models of transformers (a vision tower of patches, a projector, a decoder). Other
families add a function that returns an `ModelSpec`; nothing else in the project knows a model's attribute names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from medalign.errors import ConfigError
from medalign.geometry import PatchGrid


@dataclass(frozen=True)
class ModelSpec:
    """References into a model, and the facts about its images."""

    blocks: Sequence[nn.Module]  # decoder blocks, in order
    attentions: Sequence[Any]  # the attention module of each block
    language_model: nn.Module
    projector: nn.Module
    decoder: str  # qualified name of the language model inside the model
    width: int  # d, of the language model
    image_token_id: int
    image_size: int  # pixels a side that the vision tower takes
    grid: PatchGrid  # image tokens of one image


def anatomy(model: Any) -> ModelSpec:
    """The anatomy of a transformers model. Raises ConfigError for a family that is not supported."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    require_family(kind)
    return FAMILIES[kind](model)


def require_family(kind: str) -> None:
    """Raises ConfigError for a model type that is not supported."""
    if kind not in FAMILIES:
        raise ConfigError(f"student model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def _llava(model: Any) -> ModelSpec:
    config, inner = model.config, model.model
    vision = config.vision_config
    language = inner.language_model
    blocks = getattr(language, "layers", ())
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        raise ConfigError(
            f"the student's language model ({config.text_config.model_type}) is not a stack of blocks of one "
            "self-attention each, as Llama, Mistral and Qwen2 are; choose a student with such a one"
        )
    if config.vision_feature_select_strategy != "default" and vision.model_type == "clip_vision_model":
        raise ConfigError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}: the class token would "
            "stand among the image tokens; set it to 'default' in the student's config.json"
        )
    if vision.image_size % vision.patch_size:
        raise ConfigError(
            f"the student's image size {vision.image_size} is not a multiple of its patch size {vision.patch_size}"
        )
    side = vision.image_size // vision.patch_size
    return ModelSpec(
        blocks=blocks,
        attentions=[block.self_attn for block in blocks],
        language_model=language,
        projector=inner.multi_modal_projector,
        decoder="model.language_model",
        width=config.text_config.hidden_size,
        image_token_id=config.image_token_id,
        image_size=vision.image_size,
        grid=PatchGrid(side, side),
    )


FAMILIES = {"llava": _llava}
