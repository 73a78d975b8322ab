"""From a local model folder to a `Student`: transformers loads it, peft adapts it. Nothing is fetched."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from medalign.config import StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.student.families import Anatomy, anatomy
from medalign.student.files import check_colors, tokenizer_fault
from medalign.student.model import Student, require_layer
from medalign.student.query_mixture import QueryMixture
from medalign.student.reading import reading
from medalign.student.steering import Steering
from medalign.student.taps import tapped_name

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Eye:
    """How the student's vision tower wants its pixels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_student(config: StudentConfig, dtype: torch.dtype, seed: int = 0) -> Student:
    """The student with fresh adapters (which change nothing yet), W at zero, everything else frozen.

    Under ZeRO-3 the caller opens the engine's loading context around this, so that no rank ever holds the whole
    model. Raises ConfigError if the folder is missing, the family unknown, or the layer does not exist.
    """
    return adapt(_load_model(config, dtype), config, dtype, seed)


def adapt(model: nn.Module, config: StudentConfig, dtype: torch.dtype, seed: int = 0) -> Student:
    """A student around a model in memory. Raises ConfigError if its family is unknown or the layer does not exist."""
    parts = anatomy(model)
    require_layer(config.layer, parts)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Only now, since loading draws more or less by the way it is sharded: the same start of LoRA for this seed.
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft reads a property that transformers has renamed: nothing that a user could mend
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = get_peft_model(model, _lora(config, model, parts), autocast_adapter_dtype=False)
    if config.train_projector:
        for parameter in parts.projector.parameters():
            parameter.requires_grad_(True)
    steering = Steering(parts.width, config.epsilon).to(dtype) if config.steering else None
    mixture = None
    if config.query_mixture:
        projection: Any = parts.attentions[config.layer].q_proj
        official = config.query_mixture_form == "official"
        dropout = config.lora.dropout if official else 0.0
        mixture = QueryMixture(projection.in_features, projection.out_features, lora_start=official, dropout=dropout)
        mixture.to(dtype)
    student = Student(adapted, parts, config.layer, steering, mixture)
    if config.gradient_checkpointing:
        _checkpoint_blocks(student)
    return student


def model_folder(config: StudentConfig) -> str:
    """The folder of the student's model. Raises ConfigError where it holds none."""
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"student.path {config.path} is not a model folder (no config.json); models are read from disk alone: "
            "download one first and name its folder"
        )
    return str(folder)


def load_processor(config: StudentConfig) -> Any:
    """The student's processor (tokenizer, image settings, chat template). Raises ConfigError if it cannot be used."""
    folder = model_folder(config)
    what = f"student.path {folder} has no usable processor (tokenizer, image settings, chat template)"
    try:
        with reading(what):
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ConfigError as error:
        if fault := tokenizer_fault(Path(folder)):
            raise ConfigError(f"student.path {folder}: {fault}") from error
        raise
    check_colors(Path(folder), getattr(processor, "image_processor", None))
    return processor


def eye(processor: Any, image_size: int) -> Eye:
    """Normalisation from the model's own image processor, size from its vision tower."""
    image = processor.image_processor  # checked where the processor was loaded
    return Eye(image_size, tuple(image.image_mean), tuple(image.image_std))


def adapter_state(student: Student, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's part of `whole` (gathered parameters by name in the student), under peft's names."""
    prefix = "model."
    state = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    return get_peft_model_state_dict(_peft(student), state_dict=state, save_embedding_layers=False)


def set_adapter_state(student: Student, state: dict[str, torch.Tensor]) -> None:
    """Load an adapter saved under peft's names. Raises CheckpointError naming the first key that does not fit."""
    result: Any = set_peft_model_state_dict(_peft(student), state)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the adapter does not fit the student: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unknown, the first {[*missing, *result.unexpected_keys][0]!r}"
        )


def save_adapter_config(student: Student, folder: Path) -> None:
    """Write peft's adapter_config.json, which names the base model's folder without what is above it."""
    config = copy.copy(_peft(student).peft_config["default"])
    config.base_model_name_or_path = Path(config.base_model_name_or_path or "").name
    config.save_pretrained(str(folder))


def merged(student: Student) -> Any:
    """The transformers model with the adapters folded into its weights; the student is used up."""
    model: Any = _peft(student).merge_and_unload()
    model.set_attn_implementation("sdpa")
    return model


def _peft(student: Student) -> PeftModel:
    assert isinstance(student.model, PeftModel)
    return student.model


def _load_model(config: StudentConfig, dtype: torch.dtype) -> nn.Module:
    names, folder = attention_names(config.attention, dtype), model_folder(config)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log file it is a line a tensor
    try:
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=names, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"student.path {folder} cannot be loaded: {error}") from error


def attention_names(wanted: str, dtype: torch.dtype) -> dict[str, str]:
    """transformers' name of the attention of each part of the model: tapped in the language model only."""
    backend = choose_attention(wanted, dtype)
    vision = "eager" if backend == "eager" else "sdpa"
    return {"": "sdpa", "text_config": tapped_name(backend), "vision_config": vision}


def choose_attention(wanted: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """flash_attention_2 where it can run, else sdpa; what was asked for by name is taken or refused."""
    if dtype == torch.float32:  # flash-attn multiplies half precision only
        if wanted == "flash_attention_2":
            raise ConfigError(
                "student.attention is flash_attention_2, which computes in half precision only, and the student is "
                "loaded in fp32; set train.precision to bf16, or choose sdpa"
            )
        return "sdpa" if wanted == "auto" else wanted
    usable = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    if wanted == "flash_attention_2" and not usable:
        raise ConfigError(
            "student.attention is flash_attention_2, which needs an NVIDIA GPU and the flash-attn package "
            "(pip install flash-attn --no-build-isolation); or choose sdpa"
        )
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available() and not usable:
        log.info("attention: sdpa, because flash-attn is not installed (pip install flash-attn --no-build-isolation)")
    return "flash_attention_2" if usable else "sdpa"


def _lora(config: StudentConfig, model: nn.Module, parts: Anatomy) -> PeftLora:
    """LoRA on every linear layer of the language model's blocks, and nowhere else.

    The official mixture stands in the place of LoRA on its projection.
    """
    inside = f"{parts.decoder}.layers."
    replaced = config.query_mixture and config.query_mixture_form == "official"
    alone = parts.attentions[config.layer].q_proj if replaced else None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not alone]
    return PeftLora(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=[name for name in linear if name.startswith(inside)],
        bias="none",
    )


def _checkpoint_blocks(student: Student) -> None:
    """Recompute every block in the backward pass but the tapped one.

    Its map leaves the block by the side; recomputing it would build a second map that nobody reads, and the
    memory of one block is a small price for doing that work once.
    """
    model: Any = student.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tapped: Any = student.anatomy.blocks[student.layer]
    tapped.gradient_checkpointing = False
