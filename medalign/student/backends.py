"""The attention backend of each part of a student: flash-attention where it can run and is right, otherwise SDPA."""

from __future__ import annotations

import importlib.util
import logging

import torch

from medalign.errors import ConfigError
from medalign.student.capture import register_attention
from medalign.student.families.base import Family

log = logging.getLogger("medalign")


def attention_names(wanted: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the attention implementation for each part of the model, as transformers takes it.

    Only the language model uses an implementation that supports captures.
    """
    backend = choose_attention(wanted, dtype)
    vision = "eager" if backend == "eager" else "sdpa"
    return {"": "sdpa", "text_config": register_attention(backend), "vision_config": vision}


def allowed_attention(wanted: str, family: Family) -> str:
    """Return `wanted`, or sdpa in place of "auto" for a family that flash-attention cannot compute.

    Raises:
        ConfigError: `wanted` is flash_attention_2 for such a family.
    """
    if not family.no_flash:
        return wanted
    if wanted == "flash_attention_2":
        raise ConfigError(f"student.attention is flash_attention_2, but {family.no_flash}; choose sdpa")
    return "sdpa" if wanted == "auto" else wanted


def choose_attention(wanted: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """Choose the attention backend: flash_attention_2 where it can run, otherwise sdpa.

    Args:
        wanted: "auto", or a backend that is used as given.
        dtype: data type of the student's weights.

    Raises:
        ConfigError: `wanted` names a backend that cannot run here.
    """
    if dtype == torch.float32:  # flash-attn supports only half precision
        if wanted == "flash_attention_2":
            raise ConfigError(
                "student.attention is flash_attention_2, which supports half precision only, but the student is loaded "
                "in fp32; set train.precision to bf16, or choose sdpa"
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
