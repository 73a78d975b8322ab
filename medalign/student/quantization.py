"""QLoRA: the linear layers of the language model's blocks in 4 bits, which bitsandbytes reads and computes."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from medalign.config import StudentConfig
from medalign.errors import ConfigError


def require_quantization(config: StudentConfig) -> None:
    """Check that the weights can be quantized. Raises ConfigError if the package that does it is not installed."""
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"student.quantization is {config.quantization}, which needs the package bitsandbytes (pip install "
            "bitsandbytes); or set it to none"
        )


def stored_bytes(weights: int) -> int:
    """Return the bytes of a matrix in 4 bits: half of one per weight, and the scales.

    One byte per block of 64 weights, and a float32 per 256 of these, as in the QLoRA paper (Dettmers et al. 2023,
    "double quantization"). The tables of the formats (about 1 kB per matrix) are not counted.

    Args:
        weights: number of weights of the matrix.
    """
    scales = -(-weights // 64)
    return -(-weights // 2) + scales + 4 * -(-scales // 256)


def quantization_arguments(config: StudentConfig, decoder: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` of transformers that quantize a model while it is read.

    Weights are 4-bit NormalFloat in blocks of 64, whose scales are quantized again to 8 bits.

    Args:
        config: the student's settings.
        decoder: qualified name of the language model; only linear layers of its blocks are quantized.
        dtype: data type of the computation.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    require_quantization(config)
    if config.quantization == "none":
        return {}
    outside = rf"(?!{re.escape(decoder)}\.layers\.).+"
    settings: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[outside],
    )
    return {"quantization_config": settings}
