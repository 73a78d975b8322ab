"""Whether a student's safetensors files hold the weights that its configuration describes, and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from medalign.errors import ConfigError
from medalign.student.reading import reading, silent_transformers

_SHOWN = 4  # names in a list of weights
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def empty_model(folder: str) -> Any:
    """The model on the meta device. Raises ConfigError where its files do not hold its weights, and only them."""
    with reading(f"student.path {folder} is not a model that can be read"), silent_transformers():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
            use_safetensors=True,
        )
    model, report = loaded
    _check_names(folder, report)
    _check_tied(folder, model.all_tied_weights_keys)
    return model


def _check_names(folder: str, report: dict[str, Any]) -> None:
    """Raises ConfigError for weights that are missing, of another shape, or not the model's.

    Buffers that transformers leaves out on purpose (position_ids, inv_freq) are not in its report.
    """
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"student.path {folder}: {len(missing)} of its weights are not in its safetensors files and would be "
            f"random numbers: {_listed(missing)}; save the whole model (save_pretrained) again"
        )
    if unlike := [f"{name} {list(file)} for {list(ours)}" for name, file, ours in sorted(report["mismatched_keys"])]:
        raise ConfigError(
            f"student.path {folder}: {len(unlike)} of its weights have another shape than its config.json says: "
            f"{_listed(unlike)}; correct config.json, or save the model again"
        )
    if foreign := sorted(report["unexpected_keys"]):
        raise ConfigError(
            f"student.path {folder}: its config.json does not describe its safetensors files: {len(foreign)} of their "
            f"weights have no place in the model and would be left out: {_listed(foreign)}; correct config.json (such "
            "as num_hidden_layers), or save the model again"
        )


def _check_tied(folder: str, tied: dict[str, str]) -> None:
    """Raises ConfigError where weights that are tied by config.json differ in the files. Only these are read."""
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
    """Whether a name in a file is that of a weight: files have kept names of before transformers moved the modules."""
    return name.split(".")[-2:] == wanted.split(".")[-2:]


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """The file of each weight, by its name in the file."""
    with reading(f"student.path {folder}: its safetensors files cannot be read"):
        if (folder / _WEIGHTS).is_file():
            with safe_open(folder / _WEIGHTS, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / _WEIGHTS)
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: folder / file for name, file in index["weight_map"].items()}


def _tensor(file: Path, name: str) -> torch.Tensor:
    with reading(f"student.path {file.parent}: {file.name} cannot be read"), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
