"""Checks that a student can be trained, based on its configuration, its tokenizer and the names of its weights.

No weights are read, so `inspect` and `train` both reject an unusable student within seconds.
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
from medalign.student.families import ModelSpec, inspect_model, require_family
from medalign.student.files import check_files, check_settings, read_object
from medalign.student.loading import load_processor, model_folder
from medalign.student.model import require_layer
from medalign.student.reading import as_config_error
from medalign.student.weights import empty_model

log = logging.getLogger("medalign")


def check_student(config: StudentConfig) -> tuple[ModelSpec, Any]:
    """Check the student without reading its weights.

    Returns:
        The student's spec, which refers to modules on the meta device, and its processor.

    Raises:
        ConfigError: the student cannot be used.
    """
    folder = model_folder(config)
    check_files(Path(folder))
    _check_settings(folder)
    processor = load_processor(config)
    model = empty_model(folder)
    spec = inspect_model(model)
    require_layer(config.layer, spec)
    _check_image_features(model, spec)
    _check_vocabulary(folder, model, spec, processor.tokenizer)
    _check_projections(config, spec)
    _warn_about_window(config, model, spec)
    return spec, processor


def _check_settings(folder: str) -> None:
    """Check what config.json shows before a model is built from it."""
    found = read_object(Path(folder) / "config.json")
    check_settings(Path(folder), found)
    with as_config_error(f"student.path {folder} cannot be read as a model"):
        settings: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    require_family(settings.model_type)
    lacking = [part for part in ("text_config", "vision_config") if not found.get(part)]
    if lacking:  # transformers would build a model of 7 billion random weights
        raise ConfigError(
            f"student.path {folder}: its config.json has no {' and no '.join(lacking)}; it is not in the transformers "
            "format (checkpoints from the original LLaVA code are not): convert the model, or use a converted one "
            "(such as those by llava-hf)"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(settings.vision_config, name, None), int):
            raise ConfigError(
                f"student.path {folder}: {name} in vision_config is {getattr(settings.vision_config, name, None)}; "
                "only towers with square images and patches are supported, whose size is a single integer"
            )


def _check_image_features(model: Any, spec: ModelSpec) -> None:
    """Run the tower and the projector on the meta device: an image must yield one feature per image token."""
    side, config = spec.image_size, model.config
    settings = (
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} and vision_feature_layer "
        f"{config.vision_feature_layer}"
    )
    with as_config_error(f"the student's vision tower and projector do not run with {settings}"), torch.no_grad():
        features = model.get_image_features(pixel_values=torch.empty(1, 3, side, side, device="meta"))
    found = sum(len(image) for image in features.pooler_output)
    if found != spec.grid.size:
        raise ConfigError(
            f"with {settings}, the student's vision tower returns {found} features for an image of {spec.grid.rows} x "
            f"{spec.grid.columns} patches; in its config.json, set vision_feature_select_strategy to 'default' for a "
            "tower with a class token (CLIP), or to 'full' for one without (SigLIP)"
        )


def _check_vocabulary(folder: str, model: Any, spec: ModelSpec, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if tokens > rows:
        raise ConfigError(
            f"student.path {folder}: its tokenizer has {tokens} tokens, but its embedding has only {rows} rows; resize "
            "the model (resize_token_embeddings) and save it"
        )
    if not 0 <= spec.image_token_id < tokens:
        raise ConfigError(
            f"student.path {folder}: image_token_id is {spec.image_token_id}, but its tokenizer has {tokens} tokens; "
            "set image_token_id in config.json to the tokenizer's image token"
        )


def _check_projections(config: StudentConfig, spec: ModelSpec) -> None:
    if config.query_mixture and not hasattr(spec.attentions[config.layer], "q_proj"):
        names = [
            name for name, module in spec.attentions[config.layer].named_modules() if isinstance(module, nn.Linear)
        ]
        raise ConfigError(
            f"student.query_mixture needs a query projection (q_proj), but the attention of block {config.layer} has "
            f"{' and '.join(names)}; set student.query_mixture to false"
        )
    if not any(isinstance(module, nn.Linear) for block in spec.blocks for module in block.modules()):
        raise ConfigError("the student's blocks contain no linear layer (torch.nn.Linear) that LoRA can adapt")


def _warn_about_window(config: StudentConfig, model: Any, spec: ModelSpec) -> None:
    language = model.config.text_config
    kinds = getattr(language, "layer_types", None) or ["sliding_attention"] * len(spec.blocks)
    window = getattr(language, "sliding_window", None) if kinds[config.layer] == "sliding_attention" else None
    if window and window < spec.grid.size and distributed.is_main():
        log.warning(
            "student.layer %d: its attention covers only the last %d tokens, but an image has %d tokens: patches "
            "outside the window get an attention of zero; choose a block with full attention if there is one",
            config.layer,
            window,
            spec.grid.size,
        )


def warn_about_positions(spec: ModelSpec, max_length: int, setting: str) -> None:
    """Warn if texts may be longer than the student's language model was trained for.

    Args:
        spec: the student's spec.
        max_length: longest text, in tokens.
        setting: the user's name of max_length.
    """
    trained = getattr(spec.language_model.config, "max_position_embeddings", None)
    if isinstance(trained, int) and max_length > trained and distributed.is_main():
        log.warning(
            "%s allows %d tokens, but the student was trained with at most %d (max_position_embeddings in its "
            "config.json): it may not understand longer texts",
            setting,
            max_length,
            trained,
        )
