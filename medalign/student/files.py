"""Checks of the small files of a model folder before any library reads them; each error names the file and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.activations import ACT2FN

from medalign.errors import ConfigError
from medalign.student.reading import as_config_error

_POINTER = b"version https://git-lfs"  # start of a file that git has not downloaded
_OBJECTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "image_size",
    "patch_size",
    "num_channels",
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "projector_hidden_act")


def check_files(folder: Path) -> None:
    """Raise ConfigError for a pointer of Git LFS, for JSON that is not an object, and for a folder without weights."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_pointer(path):
            raise ConfigError(
                f"student.path {folder}: {path.name} is a pointer of Git LFS, not the file itself; run `git lfs pull` "
                "in that folder"
            )
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    if not any(folder.glob("*.safetensors")):
        old = sorted(path.name for path in folder.glob("*.bin"))
        raise ConfigError(
            f"student.path {folder}: "
            + (
                f"its weights are in {old[0]}, a pickle, which is not read; convert them to safetensors "
                "(save_pretrained of the model loaded by transformers)"
                if old
                else "it has no model.safetensors; copy the model's weights there"
            )
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raises ConfigError otherwise, which names the file."""
    with as_config_error(f"student.path {path.parent}: {path.name} cannot be read"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        found = "null" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"student.path {path.parent}: {path.name} contains {found}, not an object with settings; copy the "
            "model's file again"
        )
    return values


def check_settings(folder: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError for values of config.json from which no model can be built; it names the key."""
    for section, values in _sections(config):
        where = f"student.path {folder}: config.json: {section}"
        if values.get("quantization_config"):
            settings = values["quantization_config"]
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise ConfigError(
                f"{where}quantization_config is {method!r}: quantized students are not supported; name the model "
                "that it was made from"
            )
        for key in _COUNTS if section else ():
            value = values.get(key)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 1):
                raise ConfigError(f"{where}{key} is {value}; it must be at least 1")
        for key in _ACTIVATIONS:
            if values.get(key) is not None and values[key] not in list(ACT2FN):
                raise ConfigError(
                    f"{where}{key} is {values[key]!r}, which transformers does not know; write it as in the model"
                )
        for key in ("dtype", "torch_dtype"):
            name = values.get(key)
            if name is not None and not isinstance(getattr(torch, str(name), None), torch.dtype):
                raise ConfigError(
                    f"{where}{key} is {name!r}, which is not a type of torch; write 'bfloat16' or 'float32'"
                )


def check_colors(folder: Path, image_processor: Any) -> None:
    """Raise ConfigError unless mean and standard deviation are three numbers for pixels from 0 to 1."""
    for key, allowed in (("image_mean", "from 0 to 1"), ("image_std", "greater than 0 and at most 1")):
        values: Any = getattr(image_processor, key, None)
        values = list(values) if isinstance(values, tuple) else values
        numbers = isinstance(values, list) and len(values) == 3 and {*map(type, values)} <= {int, float}
        if not numbers or not all(0 <= value <= 1 and (value > 0 or key == "image_mean") for value in values):
            raise ConfigError(
                f"student.path {folder}: {key} is {values!r} in {_owner(folder, key)}; it must be three numbers, for "
                f"red, green and blue, {allowed} (for pixels from 0 to 1, not to 255)"
            )


def tokenizer_fault(folder: Path) -> str | None:
    """Describe what is wrong with tokenizer.json if the processor cannot be loaded; None if nothing is."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if any(folder.glob("*.model")) or any(folder.glob("vocab.*")):  # another format of tokenizer
            return None
        return "tokenizer.json is missing; copy it from the model, or save its tokenizer (save_pretrained) there"
    try:
        with as_config_error("tokenizer.json is damaged, or written by another version of tokenizers"):
            Tokenizer.from_file(str(path))
    except ConfigError as error:
        return f"{error}; copy the file of the model again, or update tokenizers"
    return None


def _owner(folder: Path, key: str) -> str:
    """Return the name of the image settings file that contains a key, or should."""
    names = ("processor_config.json", "preprocessor_config.json")
    held = [name for name in names if (folder / name).is_file() and f'"{key}"' in (folder / name).read_text("utf-8")]
    return held[0] if held else names[1]


def _sections(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", config
    for name in ("text_config", "vision_config"):
        if isinstance(config.get(name), dict):
            yield f"{name}.", config[name]


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
