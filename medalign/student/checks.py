"""Checks that a student can be trained, based on its configuration, its tokenizer and the names of its weights.

No weights are read, so `inspect` and `train` both reject an unusable student within seconds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from medalign import distributed
from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.families import ModelSpec, inspect_model, require_family
from medalign.student.loading import load_processor, model_folder
from medalign.student.model import require_layer

log = logging.getLogger("medalign")

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)
_MAX_NAMES = 4  # weights named in an error message


def check_student(config: StudentConfig) -> tuple[ModelSpec, Any]:
    """Check the student without reading its weights.

    Returns:
        The student's spec, which refers to modules on the meta device, and its processor.

    Raises:
        ConfigError: the student cannot be used.
    """
    folder = model_folder(config)
    _check_settings(folder)
    processor = load_processor(config)
    model = _empty_model(folder)
    spec = inspect_model(model)
    require_layer(config.layer, spec)
    _check_image_features(model, spec)
    _check_vocabulary(folder, model, spec, processor.tokenizer)
    _check_projections(config, spec)
    _warn_about_window(config, model, spec)
    return spec, processor


def _check_settings(folder: str) -> None:
    """Check what config.json shows before a model is built from it."""
    with _convert_errors(folder):
        settings: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
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


def _empty_model(folder: str) -> Any:
    """Load the model on the meta device.

    Raises:
        ConfigError: a weight is missing from the model's files, or its shape does not match the configuration.
    """
    with _convert_errors(folder), _silent_transformers():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
            use_safetensors=True,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"student.path {folder}: {len(missing)} of its weights are not in its safetensors files and would be "
            f"initialized randomly: {_format_names(missing)}; save the complete model (save_pretrained) again"
        )
    keys = sorted(report["mismatched_keys"])
    if mismatched := [f"{name} {list(found)}, expected {list(expected)}" for name, found, expected in keys]:
        raise ConfigError(
            f"student.path {folder}: {len(mismatched)} of its weights do not have the shape that its config.json "
            f"implies: {_format_names(mismatched)}; correct config.json, or save the model again"
        )
    return model


def _check_image_features(model: Any, spec: ModelSpec) -> None:
    """Run the tower and the projector on the meta device: an image must yield one feature per image token."""
    side, config = spec.image_size, model.config
    settings = (
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} and vision_feature_layer "
        f"{config.vision_feature_layer}"
    )
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=torch.empty(1, 3, side, side, device="meta"))
    except (*_UNREADABLE, IndexError) as error:
        raise ConfigError(f"the student's vision tower and projector do not run with {settings}: {error}") from error
    found = sum(len(image) for image in features.pooler_output)
    if found != spec.grid.size:
        raise ConfigError(
            f"with {settings}, the student's vision tower returns {found} features for an image of {spec.grid.rows} x "
            f"{spec.grid.columns} patches; in its config.json, set vision_feature_select_strategy to 'default' for a "
            "tower with a class token (CLIP), or to 'full' for one without (SigLIP)"
        )


def _check_vocabulary(folder: str, model: Any, spec: ModelSpec, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
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


def _format_names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _convert_errors(folder: str) -> Iterator[None]:
    """Convert errors that transformers raises inside the context into a ConfigError that names the folder."""
    try:
        yield
    except StrictDataclassError as error:
        raise ConfigError(f"student.path {folder}: config.json: {' '.join(str(error).split())}") from error
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"student.path {folder} cannot be read as a model: {reason}") from error


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Suppress transformers' report of missing weights and its progress bar inside the context.

    Missing weights are reported as an error, and no weights are read.
    """
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
