"""Whether a student can be trained, from its configuration, its tokenizer and the names of its weights.

No weight is read, so a student that cannot be used is refused in seconds, by `inspect` and by `train` alike.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from medalign import distributed
from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.families import Anatomy, anatomy, require_family
from medalign.student.files import check_files, check_settings, read_object
from medalign.student.loading import load_processor, model_folder
from medalign.student.model import require_layer
from medalign.student.reading import reading
from medalign.student.weights import empty_model

log = logging.getLogger("medalign")


def check_student(config: StudentConfig) -> tuple[Anatomy, Any]:
    """The student's anatomy, of modules without weights, and its processor. Raises ConfigError if it cannot be used."""
    folder = model_folder(config)
    check_files(Path(folder))
    _check_settings(folder)
    processor = load_processor(config)
    model = empty_model(folder)
    parts = anatomy(model)
    require_layer(config.layer, parts)
    _check_image_features(model, parts)
    _check_vocabulary(folder, model, parts, processor.tokenizer)
    _check_projections(config, parts)
    _say_window(config, model, parts)
    return parts, processor


def _check_settings(folder: str) -> None:
    """What can be seen in config.json before a model is built of it."""
    found = read_object(Path(folder) / "config.json")
    check_settings(Path(folder), found)
    with reading(f"student.path {folder} is not a model that can be read"):
        settings: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    require_family(settings.model_type)
    lacking = [part for part in ("text_config", "vision_config") if not found.get(part)]
    if lacking:  # transformers would build a model of 7 billion random weights
        raise ConfigError(
            f"student.path {folder}: its config.json has no {' and no '.join(lacking)}; it is not in the form of "
            "transformers (checkpoints of the original LLaVA code are not): convert the model, or name a converted "
            "one (such as llava-hf's)"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(settings.vision_config, name, None), int):
            raise ConfigError(
                f"student.path {folder}: {name} in vision_config is {getattr(settings.vision_config, name, None)}; "
                "towers of square images and patches are supported, whose size is one whole number"
            )


def _check_image_features(model: Any, parts: Anatomy) -> None:
    """Run tower and projector without numbers: an image must give as many features as it has tokens."""
    side, config = parts.image_size, model.config
    told = (
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} and vision_feature_layer "
        f"{config.vision_feature_layer}"
    )
    with reading(f"the student's vision tower and projector do not run with {told}"), torch.no_grad():
        features = model.get_image_features(pixel_values=torch.empty(1, 3, side, side, device="meta"))
    found = sum(len(image) for image in features.pooler_output)
    if found != parts.grid.size:
        raise ConfigError(
            f"with {told} the student's vision tower gives {found} features for an image of {parts.grid.rows} x "
            f"{parts.grid.columns} patches; in its config.json, set vision_feature_select_strategy to 'default' for a "
            "tower with a class token (CLIP), to 'full' for one without (SigLIP)"
        )


def _check_vocabulary(folder: str, model: Any, parts: Anatomy, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if tokens > rows:
        raise ConfigError(
            f"student.path {folder}: its tokenizer has {tokens} tokens, its embedding {rows} rows; resize the model "
            "(resize_token_embeddings) and save it"
        )
    if not 0 <= parts.image_token_id < tokens:
        raise ConfigError(
            f"student.path {folder}: image_token_id is {parts.image_token_id}, its tokenizer has {tokens} tokens; set "
            "image_token_id in config.json to the tokenizer's image token"
        )


def _check_projections(config: StudentConfig, parts: Anatomy) -> None:
    if config.query_mixture and not hasattr(parts.attentions[config.layer], "q_proj"):
        names = [
            name for name, module in parts.attentions[config.layer].named_modules() if isinstance(module, nn.Linear)
        ]
        raise ConfigError(
            f"student.query_mixture needs a query projection (q_proj), but the attention of block {config.layer} has "
            f"{' and '.join(names)}; set student.query_mixture to false"
        )
    if not any(isinstance(module, nn.Linear) for block in parts.blocks for module in block.modules()):
        raise ConfigError("the student's blocks hold no linear layer (torch.nn.Linear) that LoRA could adapt")


def _say_window(config: StudentConfig, model: Any, parts: Anatomy) -> None:
    language = model.config.text_config
    kinds = getattr(language, "layer_types", None) or ["sliding_attention"] * len(parts.blocks)
    window = getattr(language, "sliding_window", None) if kinds[config.layer] == "sliding_attention" else None
    if window and window < parts.grid.size and distributed.is_main():
        log.warning(
            "student.layer %d: its attention sees the last %d tokens only, an image has %d: patches out of the window "
            "count as not looked at; choose a block of full attention if there is one",
            config.layer,
            window,
            parts.grid.size,
        )
