"""Checks that a student can be trained, based on its configuration, its tokenizer and the names of its weights.

No weights are read, so `inspect` and `train` both reject an unusable student within seconds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from medalign import distributed
from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.backends import allowed_attention
from medalign.student.families.base import ModelSpec
from medalign.student.families.registry import inspect_model
from medalign.student.files import check_files, check_settings, read_object
from medalign.student.loading import load_processor, model_folder
from medalign.student.lora import lora_layers, warn_about_experts
from medalign.student.model import require_layer
from medalign.student.quantization import require_quantization
from medalign.student.reading import as_config_error
from medalign.student.weights import empty_model, family_of

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
    _check_settings(folder, config)
    require_quantization(config)
    processor = load_processor(config)
    model = empty_model(folder, config)
    spec = inspect_model(model)
    for layer in config.layers:
        require_layer(layer, spec)
    if config.image_size not in (None, spec.image_size):
        raise ConfigError(
            f"student.image_size is {config.image_size}, but this student takes images of {spec.image_size} pixels "
            "only; set it to null"
        )
    if config.steering_rank is not None and config.steering_rank > spec.width:
        raise ConfigError(
            f"student.steering_rank is {config.steering_rank}, but W is a matrix of {spec.width} x {spec.width}, the "
            "student's hidden size; set it to a smaller number, or to null for a full matrix"
        )
    for layer in config.layers:
        _check_window(layer, spec)
    _check_image_features(spec)
    _check_vocabulary(folder, model, spec, processor.tokenizer)
    _check_projections(config, spec)
    return spec, processor


def _check_settings(folder: str, config: StudentConfig) -> None:
    """Check what config.json shows before a model is built from it."""
    found = read_object(Path(folder) / "config.json")
    check_settings(Path(folder), found)
    family = family_of(folder)
    family.check(Path(folder), found)
    allowed_attention(config.attention, family)
    with as_config_error(f"student.path {folder} cannot be read as a model"):
        settings = family.config(Path(folder), config)
    family.image(settings)


def _check_image_features(spec: ModelSpec) -> None:
    """Run the tower and the projector on the meta device: an image must yield one feature per image token."""
    family, side = spec.family, spec.image_size
    if not family.runs_without_data:
        return
    settings = family.features_settings(spec.model.config)
    with as_config_error(f"the student's vision tower and projector do not run with {settings}"), torch.no_grad():
        found = family.features(spec, torch.empty(1, 3, side, side, device="meta")).shape[1]
    if found != spec.image.count:
        raise ConfigError(
            f"with {settings}, the student's vision tower returns {found} features for an image of {spec.grid.rows} x "
            f"{spec.grid.columns} patches; {family.features_remedy}"
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
    if config.query_mixture:
        layer = config.layers[0]
        projection, queries = spec.query_projection(layer)
        if config.query_mixture_form == "official" and queries < projection.out_features:
            raise ConfigError(
                "student.query_mixture_form is official, which replaces the LoRA of the query projection, but block "
                f"{layer} computes queries, keys and values in one; set it to beside_lora"
            )
    if config.train == "lora":
        lora_layers(config, spec)
    warn_about_experts(config, spec)


def _check_window(layer: int, spec: ModelSpec) -> None:
    """Raise ConfigError if the tapped block cannot attend to a whole image: the map would be zero at some cells."""

    def covers(block: int) -> bool:
        window = spec.window(block)
        return window is None or window >= spec.image.count

    if covers(layer):
        return
    others = [str(block) for block in range(1, len(spec.blocks)) if covers(block)]
    remedy = f"set student.layer to {' or '.join(others)}" if others else "choose a student with full attention"
    raise ConfigError(
        f"student.layer is {layer}, whose attention covers only the last {spec.window(layer)} tokens, "
        f"but an image has {spec.image.count}: its attention to some patches would always be zero; {remedy}"
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
