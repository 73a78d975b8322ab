"""Loads a `Student` from a local model folder with transformers, and adds LoRA with peft. Nothing is downloaded."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from medalign.config import StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.student.backends import allowed_attention, attention_names
from medalign.student.families.base import ModelSpec
from medalign.student.families.registry import inspect_model
from medalign.student.files import check_colors, tokenizer_fault
from medalign.student.lora import lora_layers
from medalign.student.model import Student, require_layer
from medalign.student.quantization import quantization_arguments
from medalign.student.query_mixture import QueryMixture
from medalign.student.reading import as_config_error
from medalign.student.steering import Steering
from medalign.student.trained_parts import freeze_other_parts
from medalign.student.weights import family_of, load_model


def load_student(config: StudentConfig, dtype: torch.dtype, seed: int = 0) -> Student:
    """Load the student with newly initialized adapters and W, which change no output yet, and freeze everything else.

    Under ZeRO-3, call it on every rank inside `engine.sharded_loading`, so that no rank ever holds the complete model.

    Args:
        config: the student's section of the configuration.
        dtype: data type of the weights.
        seed: seed of the adapters' initial weights.

    Raises:
        ConfigError: the folder is missing, the family is not supported, or the layer does not exist.
    """
    return adapt(_load_model(config, dtype), config, dtype, seed)


def adapt(model: nn.Module, config: StudentConfig, dtype: torch.dtype, seed: int = 0) -> Student:
    """Turn a model in memory into a student; the arguments are those of `load_student`.

    Raises:
        ConfigError: the model's family is not supported, or the layer does not exist.
    """
    spec = inspect_model(model)
    for layer in config.layers:
        require_layer(layer, spec)
    freeze_other_parts(config, spec)
    # The seed is set after loading, because the random numbers that loading draws depend on the sharding. LoRA then
    # starts from the same weights for the same seed.
    torch.manual_seed(seed)
    adapted = _with_adapters(model, config, spec) if config.train == "lora" else model
    layers = config.layers if config.steering else ()
    steering = [Steering(spec.width, config.epsilon, config.steering_rank).to(dtype) for _ in layers]
    mixture = _mixture(config, spec).to(dtype) if config.query_mixture else None
    student = Student(adapted, spec, config.layers, steering, mixture)
    if config.gradient_checkpointing:
        _checkpoint_blocks(student)
    return student


def _with_adapters(model: Any, config: StudentConfig, spec: ModelSpec) -> nn.Module:
    """Add LoRA, and keep what is trained besides it: peft freezes everything else."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        # peft reads a property that transformers has renamed; users cannot do anything about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted: nn.Module = get_peft_model(model, _lora(config, spec), autocast_adapter_dtype=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapted


def _mixture(config: StudentConfig, spec: ModelSpec) -> QueryMixture:
    projection, queries = spec.query_projection(config.layers[0])
    official = config.query_mixture_form == "official"
    dropout = config.lora.dropout if official else 0.0
    return QueryMixture(projection.in_features, queries, lora_start=official, dropout=dropout)


def model_folder(config: StudentConfig) -> str:
    """Return the folder of the student's model.

    Raises:
        ConfigError: the folder does not contain a model.
    """
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"student.path {config.path} is not a model folder (no config.json); models are read only from disk: "
            "download one first and give its folder"
        )
    return str(folder)


def load_processor(config: StudentConfig) -> Any:
    """Load the student's processor (tokenizer, image settings, chat template).

    Raises:
        ConfigError: the folder does not contain a usable processor.
    """
    folder = model_folder(config)
    subject = f"student.path {folder} has no usable processor (tokenizer, image settings, chat template)"
    try:
        with as_config_error(subject):
            processor = family_of(folder).processor(Path(folder), config)
    except ConfigError as error:
        if fault := tokenizer_fault(Path(folder)):
            raise ConfigError(f"student.path {folder}: {fault}") from error
        raise
    check_colors(Path(folder), getattr(processor, "image_processor", None))
    return processor


def adapter_state(student: Student, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Select the adapter's weights from `parameters` and give them peft's names.

    Args:
        student: the student that the parameters belong to.
        parameters: gathered parameters by their name in the student.
    """
    prefix = "model."
    state = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
    adapter: dict[str, torch.Tensor] = get_peft_model_state_dict(
        _peft(student), state_dict=state, save_embedding_layers=False
    )
    return adapter


def set_adapter_state(student: Student, state: dict[str, torch.Tensor]) -> None:
    """Load an adapter whose weights have peft's names.

    Raises:
        CheckpointError: the adapter does not fit the student; the message names the first such key.
    """
    result: Any = set_peft_model_state_dict(_peft(student), state)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the adapter does not fit the student: {len(missing)} missing weights, {len(result.unexpected_keys)} "
            f"unexpected ones; the first is {[*missing, *result.unexpected_keys][0]!r}"
        )


def save_adapter_config(student: Student, folder: Path) -> None:
    """Write peft's adapter_config.json, with only the last component of the base model's path."""
    config = copy.copy(_peft(student).peft_config["default"])
    config.base_model_name_or_path = Path(config.base_model_name_or_path or "").name
    config.save_pretrained(str(folder))


def merge_adapters(student: Student) -> Any:
    """Return the transformers model, with the adapters merged into its weights if it has any.

    The merge happens in place, so the student must not be used afterwards.
    """
    model: Any = _peft(student).merge_and_unload() if isinstance(student.model, PeftModel) else student.model
    model.set_attn_implementation("sdpa")
    return model


def _peft(student: Student) -> PeftModel:
    assert isinstance(student.model, PeftModel)
    return student.model


def _load_model(config: StudentConfig, dtype: torch.dtype) -> nn.Module:
    folder = model_folder(config)
    family = family_of(folder)
    names = attention_names(allowed_attention(config.attention, family), dtype)
    quantized = quantization_arguments(config, family.decoder, dtype)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # it would add one line per tensor to a log file
    try:
        model: nn.Module = load_model(folder, config, dtype=dtype, attn_implementation=names, **quantized)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"student.path {folder} cannot be loaded: {error}") from error
    return model


def _lora(config: StudentConfig, spec: ModelSpec) -> PeftLora:
    """Configure LoRA for linear layers of the language model's blocks only."""
    return PeftLora(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        use_rslora=config.lora.rank_stabilized,
        use_dora=config.lora.dora,
        target_modules=lora_layers(config, spec),
        bias="none",
    )


def _checkpoint_blocks(student: Student) -> None:
    """Recompute every block except the tapped ones in the backward pass.

    A tapped block also stores its attention in the capture. Recomputing the block would compute that attention a
    second time and discard it. Keeping the activations of one block costs little memory.
    """
    model: Any = student.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in student.layers:
        tapped: Any = student.spec.blocks[layer]
        tapped.gradient_checkpointing = False
