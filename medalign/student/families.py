"""Locations of a model's parts: decoder blocks, vision tower, projector, image tokens.

One family is supported: LLaVA-class models in transformers (a vision tower with patches, a projector, a decoder). A
new family adds a function that returns a `ModelSpec`. No other module refers to a model's attribute names.
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
    """References to the parts of a model, and the properties of its images."""

    blocks: Sequence[nn.Module]  # decoder blocks, in order
    attentions: Sequence[Any]  # the attention module of each block
    language_model: nn.Module
    projector: nn.Module
    decoder: str  # qualified name of the language model inside the model
    width: int  # d, hidden size of the language model
    image_token_id: int
    image_size: int  # input resolution of the vision tower, pixels per side
    grid: PatchGrid  # image tokens per image


def inspect_model(model: Any) -> ModelSpec:
    """Return the spec of a transformers model.

    Raises:
        ConfigError: the model's family is not supported.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    require_family(kind)
    return FAMILIES[kind](model)


def require_family(kind: str) -> None:
    """Check that a model type is supported.

    Raises:
        ConfigError: it is not.
    """
    if kind not in FAMILIES:
        raise ConfigError(f"student model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def _llava(model: Any) -> ModelSpec:
    config, inner = model.config, model.model
    vision = config.vision_config
    language = inner.language_model
    blocks = getattr(language, "layers", ())
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        raise ConfigError(
            f"the student's language model ({config.text_config.model_type}) is not a stack of blocks with one "
            "self-attention each; choose a student whose language model is, such as Llama, Mistral or Qwen2"
        )
    if config.vision_feature_select_strategy != "default" and vision.model_type == "clip_vision_model":
        raise ConfigError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, which would include the "
            "class token in the image tokens; set it to 'default' in the student's config.json"
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
