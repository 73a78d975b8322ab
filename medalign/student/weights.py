"""Reads a student's weights. Its safetensors files must contain exactly those that its configuration describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.families.base import Family
from medalign.student.families.registry import find_family
from medalign.student.files import read_object
from medalign.student.reading import as_config_error, silent_transformers

_MAX_NAMES = 4  # weights named in an error message
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def family_of(folder: str) -> Family:
    """Return the family of a model folder. Raises ConfigError if no family can read it."""
    return find_family(Path(folder), read_object(Path(folder) / "config.json"))


def empty_model(folder: str, settings: StudentConfig) -> Any:
    """Load the model on the meta device, without its weights.

    Raises:
        ConfigError: a weight is missing, unexpected, of another shape, or tied to a weight with other values.
    """
    with as_config_error(f"student.path {folder} cannot be read as a model"), silent_transformers():
        model = load_model(folder, settings, device_map="meta")
    _check_tied(folder, model.all_tied_weights_keys)
    return model


def load_model(folder: str, settings: StudentConfig, **arguments: Any) -> Any:
    """Load a model as its family says.

    Args:
        folder: the model's folder.
        settings: the user's settings of the student.
        **arguments: passed to `from_pretrained` of transformers.

    Raises:
        ConfigError: a weight is missing, unexpected, or of another shape.
    """
    family = family_of(folder)
    model, report = family.model_class.from_pretrained(
        folder,
        config=family.config(Path(folder), settings),
        key_mapping=family.key_mapping,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        local_files_only=True,
        use_safetensors=True,
        **arguments,
    )
    _check_names(folder, report)
    return model


def _check_names(folder: str, report: dict[str, Any]) -> None:
    """Raise ConfigError for weights that are missing, of another shape, or unexpected.

    Buffers that transformers ignores on purpose (position_ids, inv_freq) are not in its report.
    """
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
    if foreign := sorted(report["unexpected_keys"]):
        raise ConfigError(
            f"student.path {folder}: its config.json does not describe its safetensors files: {len(foreign)} of their "
            f"weights do not exist in the model and would be ignored: {_format_names(foreign)}; correct "
            "config.json (such as num_hidden_layers), or save the model again"
        )


def _check_tied(folder: str, tied: dict[str, str]) -> None:
    """Raise ConfigError if weights that config.json ties differ in the files. Only these weights are read."""
    files = _files_of_weights(Path(folder)) if tied else {}
    for target, source in tied.items():
        found = [next((name for name in files if _same_weight(name, wanted)), None) for wanted in (target, source)]
        if None in found:
            continue
        ours, other = (_tensor(files[name], name) for name in found if name)
        if not torch.equal(ours, other):
            raise ConfigError(
                f"student.path {folder}: its config.json ties {target} to {source} (tie_word_embeddings), but the two "
                "differ in its safetensors files; set tie_word_embeddings to false in config.json, or save the model "
                "again"
            )


def _same_weight(name: str, wanted: str) -> bool:
    """Compare names by their end: files keep the names from before transformers moved the modules."""
    return name.split(".")[-2:] == wanted.split(".")[-2:]


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """Map each weight's name in the files to its file."""
    with as_config_error(f"student.path {folder}: its safetensors files cannot be read"):
        if (folder / _WEIGHTS).is_file():
            with safe_open(folder / _WEIGHTS, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / _WEIGHTS)
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: folder / file for name, file in index["weight_map"].items()}


def _tensor(path: Path, name: str) -> torch.Tensor:
    with as_config_error(f"student.path {path.parent}: {path.name} cannot be read"), safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _format_names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
