"""Writes a merged student in the layout of its base model's folder, so that the code of its authors loads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medalign.errors import CheckpointError

_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".md")  # pickles of the same weights; the card is that of the export


def write_authors_layout(
    model: Any, base: Path, key_mapping: Mapping[str, str], output: Path, *, tower_trained: bool = False
) -> None:
    """Write the weights under the names, in the files and in the precision that the base model's folder has.

    All other files are copied: configuration, tokenizer and the description of the vision tower.

    Args:
        model: the merged model of transformers.
        base: the base model's folder.
        key_mapping: patterns of the names in its files, and what transformers replaces them by.
        output: the new folder.
        tower_trained: whether the vision tower differs from the one that config.json names. The authors' code then
            reads it from these files only with `unfreeze_mm_vision_tower`, which is set.

    Raises:
        CheckpointError: a weight of the model has no place in the files.
    """
    output.mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = model.state_dict()
    left = set(state) - set(model.all_tied_weights_keys)
    for path in sorted(base.iterdir()):
        if path.is_dir():
            shutil.copytree(path, output / path.name, ignore=shutil.ignore_patterns(*(f"*{end}" for end in _LEFT_OUT)))
        elif path.suffix == ".safetensors":
            left -= _rewrite(path, output / path.name, state, key_mapping)
        elif path.suffix not in _LEFT_OUT:
            shutil.copy(path, output / path.name)
    if left:
        raise CheckpointError(
            f"{len(left)} weights have no place in the files of {base}, such as {sorted(left)[0]!r}; export without "
            "--layout authors"
        )
    if tower_trained:
        config = output / "config.json"
        values = json.loads(config.read_text(encoding="utf-8")) | {"unfreeze_mm_vision_tower": True}
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _rewrite(source: Path, target: Path, state: Mapping[str, torch.Tensor], key_mapping: Mapping[str, str]) -> set[str]:
    """Write a file with the model's weights under the names of the source. Returns the names in the model."""
    tensors, written = {}, set()
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is not a mapping)
            old, own = file.get_tensor(name), _own_name(name, key_mapping)
            if own in state:
                written.add(own)
                old = state[own].to(old.dtype).contiguous()
            tensors[name] = old
        save_file(tensors, target, metadata=file.metadata())
    return written


def _own_name(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        found, count = re.subn(pattern, replacement, name)
        if count:
            return found
    return name
