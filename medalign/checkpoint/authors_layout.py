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
from medalign.student.towers import tower_name

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # of the same weights
_LEFT_OUT = (*_PICKLES, ".md")  # the card is that of the export
_TOWER = "model.vision_tower.vision_tower."


def write_authors_layout(
    model: Any, base: Path, key_mapping: Mapping[str, str], output: Path, *, tower_trained: bool = False
) -> None:
    """Write the weights under the names, in the files and in the precision that the base model's folder has.

    All other files are copied: configuration, tokenizer and the description of the vision tower. Where the tower has
    weights in a folder of its own, from which the authors' code reads it, the model's are written there as safetensors.

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
    if place := _tower_with_weights(base):
        _write_tower(output, output / place)
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


def _tower_with_weights(base: Path) -> Path | None:
    """Return the folder of the tower that config.json names, relative to `base`, if it is in it and has weights."""
    place = Path(tower_name(json.loads((base / "config.json").read_text(encoding="utf-8"))))
    folder = (base / place).resolve()
    if base.resolve() not in folder.parents or not folder.is_dir():
        return None
    return place if any(path.suffix in (".safetensors", *_PICKLES) for path in folder.iterdir()) else None


def _write_tower(output: Path, folder: Path) -> None:
    """Write the tower's weights, which are in the files of `output`, into its folder, under the names of CLIP."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_TOWER)]  # noqa: SIM118 (it is not a mapping)
            tensors |= {name.removeprefix(_TOWER): file.get_tensor(name) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _own_name(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        found, count = re.subn(pattern, replacement, name)
        if count:
            return found
    return name
