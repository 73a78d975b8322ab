"""Vision towers that a student's folder names without describing them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, CLIPImageProcessor, CLIPVisionConfig

from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.reading import as_config_error

# CLIP ViT-L/14 of OpenAI at two resolutions, by the end of its name; facts of its own config.json.
_CLIP_L14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_KNOWN = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
TOWER_KEYS = ("mm_vision_tower", "vision_tower")  # that name the tower in the layout of LLaVA's authors
_FILE, _IMAGE_FILE = "config.json", "preprocessor_config.json"


def tower_name(values: Mapping[str, Any]) -> Any:
    """Return the name of the vision tower in a config.json of LLaVA's authors as their code finds it, or None."""
    return next((values[key] for key in TOWER_KEYS if key in values), None)


def tower_config(folder: Path, name: str, settings: StudentConfig) -> Any:
    """Return the configuration of a vision tower.

    Args:
        folder: the student's folder.
        name: the tower's name in config.json: a folder in that folder, or a repository.
        settings: the user's settings; student.vision_tower comes first.

    Raises:
        ConfigError: the tower is not known.
    """
    place = _place(folder, name, settings)
    if place is None:
        return CLIPVisionConfig(**_CLIP_L14, image_size=_known(folder, name))
    with as_config_error(f"student.vision_tower {place} cannot be read as a vision tower"):
        config = AutoConfig.from_pretrained(place, local_files_only=True)
    return getattr(config, "vision_config", config)


def image_processor(folder: Path, name: str, settings: StudentConfig) -> Any:
    """Return the image processor of a vision tower; the arguments are those of `tower_config`.

    Raises:
        ConfigError: the tower is not known, or its folder has no preprocessor_config.json.
    """
    place = _place(folder, name, settings)
    if place is not None:
        if not (place / _IMAGE_FILE).is_file():
            raise ConfigError(f"student.vision_tower {place} has no {_IMAGE_FILE}; copy it from the tower")
        with as_config_error(f"student.vision_tower {place}: {_IMAGE_FILE} cannot be read"):
            return AutoImageProcessor.from_pretrained(place, local_files_only=True)
    size = _known(folder, name)
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})  # CLIP's colors


def _place(folder: Path, name: str, settings: StudentConfig) -> Path | None:
    """Return the folder that describes the tower, or None."""
    if settings.vision_tower:
        if not (Path(settings.vision_tower) / _FILE).is_file():
            raise ConfigError(f"student.vision_tower {settings.vision_tower} is not a model folder (no {_FILE})")
        return Path(settings.vision_tower)
    return folder / name if (folder / name / _FILE).is_file() else None


def _known(folder: Path, name: str) -> int:
    end = Path(name).name.replace("_", "-")
    if end not in _KNOWN:
        raise ConfigError(
            f"student.path {folder}: config.json names the vision tower {name}, which is not in the folder and not "
            f"known; set student.vision_tower to its folder, with {_FILE} and {_IMAGE_FILE}"
        )
    return _KNOWN[end]
