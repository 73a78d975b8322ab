"""The vision tower that an adapter of LLaVA's code was trained with, in the form of transformers.

A CLIP of transformers stays as it is. A tower of open_clip and timm, as LLaVA-Rad has it, is described by a JSON file
with `vision_cfg` beside one checkpoint (.pt). It becomes a `Dinov2Model` that computes the same (`teacher_towers`).
LLaVA-Rad takes the patches before the last block, which is `mm_vision_select_layer` -2 in both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from medalign.errors import ConfigError
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.timm_vit import TimmTower
from tools.teacher_towers import transformers_tower

_PREFIX = "vision_model."


@dataclass(frozen=True)
class AdapterTower:
    """Weights by the names of transformers' vision model, and a function that writes its two JSON files to a folder."""

    weights: dict[str, torch.Tensor]
    describe: Callable[[Path], None]


def read_tower(folder: Path) -> AdapterTower:
    """Read a vision tower.

    Args:
        folder: the folder of a CLIP in transformers' format, or that of an adapter with the files of open_clip.

    Raises:
        ConfigError: the folder has no tower, or one that LLaVA cannot contain.
        CheckpointError: the weights cannot be read, or do not fit the tower.
    """
    described = [(path, values) for path, values in _json_files(folder) if "vision_cfg" in values]
    if len(described) == 1:
        return _from_open_clip(folder, *described[0])
    if described:
        raise ConfigError(
            f"{folder} describes several towers: {', '.join(path.name for path, _ in described)}; keep one"
        )
    return _from_transformers(folder)


def _from_transformers(folder: Path) -> AdapterTower:
    files = [folder / name for name in ("config.json", "preprocessor_config.json")]
    for path in files:
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no {path.name}; give the folder of the adapter's vision tower with --tower: a CLIP in "
                "transformers' format"
            )
    state = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    kept = {name: value for name, value in state.items() if name.startswith(_PREFIX) and "position_ids" not in name}
    if not kept:
        raise ConfigError(
            f"{folder} has no weights named {_PREFIX}* in safetensors files; give the folder of a CLIP in "
            "transformers' format with --tower"
        )

    def describe(target: Path) -> None:
        for path in files:
            shutil.copy(path, target)

    return AdapterTower({name.removeprefix(_PREFIX): value for name, value in kept.items()}, describe)


def _from_open_clip(folder: Path, path: Path, values: dict[str, Any]) -> AdapterTower:
    checkpoints = sorted(folder.glob("*.pt"))
    if len(checkpoints) != 1:
        found = ", ".join(each.name for each in checkpoints) or "none"
        raise ConfigError(f"{path} describes a tower of open_clip, whose checkpoint must be the only .pt file: {found}")
    if not values["vision_cfg"].get("timm_model_name"):
        raise ConfigError(
            f"{path}: vision_cfg has no timm_model_name; only towers of timm are supported beside an adapter"
        )
    # The file gives no normalization. open_clip, by which the adapter was trained, then takes OpenAI's.
    mean, std = list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD)
    source = TeacherSource(str(path), "timm", values, checkpoints[0], mean, std)
    size = TimmTower.check(source)
    model = transformers_tower(source, TimmTower.load(source, "before_norm"))
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=mean, image_std=std
    )

    def describe(target: Path) -> None:
        model.config.save_pretrained(target)
        images.save_pretrained(target)

    return AdapterTower(model.state_dict(), describe)


def _json_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; copy it again") from error
        if isinstance(values, dict):
            yield path, values
