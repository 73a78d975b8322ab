"""Source of a teacher: a folder with the layout of open_clip's hub models, or an open_clip architecture by name.

Everything that the configuration determines is checked here, before any weights are read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import open_clip

from medalign.errors import ConfigError
from medalign.geometry import PreprocessCfg

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
SCHEME = "open_clip:"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TeacherSource:
    """Architecture, weights file and preprocessing of a teacher."""

    name: str  # the configuration file or the name given by the user, for error messages
    model_config: dict[str, Any]
    weights: Path
    mean: Sequence[float]
    std: Sequence[float]


def find_teacher(path: str | Path) -> TeacherSource:
    """Resolve a path or a name to a teacher's source and check it.

    Args:
        path: a folder, or `open_clip:ARCH/WEIGHTS`.

    Raises:
        ConfigError: the source is not valid; the message names the file and the key.
    """
    source = _named_source(str(path)) if str(path).startswith(SCHEME) else _folder_source(Path(path))
    _require_vision(source)
    _require_colors(source)
    return source


def read_preprocess_cfg(path: str | Path) -> PreprocessCfg:
    """How a teacher takes its pixels, from its configuration; its weights are not read."""
    source = find_teacher(path)
    mean, std = source.mean, source.std
    return PreprocessCfg(_square_size(source, "image_size"), (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _require_vision(source: TeacherSource) -> None:
    """Raise ConfigError for a kind of tower that is not supported, or whose patches do not tile its images."""
    where, vision = f"teacher {source.name}", source.model_config["vision_cfg"]
    known = [field.name for field in fields(open_clip.CLIPVisionCfg)]
    for key in vision:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"open_clip knows {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r} in model_cfg.vision_cfg; {hint}")
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), Sequence):
        tower = vision.get("timm_model_name") or "a ResNet"
        raise ConfigError(f"{where}: its vision tower is {tower}; supported: open_clip's VisionTransformer")
    if vision.get("pool_type", "tok") != "tok":
        raise ConfigError(
            f"{where}: model_cfg.vision_cfg.pool_type is {vision['pool_type']!r}: its class token, whose attention is "
            "distilled, was not trained; supported: 'tok'"
        )
    image, patch = _square_size(source, "image_size"), _square_size(source, "patch_size")
    if image % patch:
        raise ConfigError(
            f"{where}: its image size {image} is not a multiple of its patch size {patch}: the patches would cover "
            f"only {image // patch * patch} of {image} pixels and would not align with the student's patches"
        )


def _square_size(source: TeacherSource, key: str) -> int:
    """Return a size of the vision tower, in pixels per side. Raises ConfigError if it is not square."""
    size = source.model_config["vision_cfg"].get(key, getattr(open_clip.CLIPVisionCfg, key))
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise ConfigError(
            f"teacher {source.name}: model_cfg.vision_cfg.{key} is {size!r}; supported: a positive integer (square)"
        )
    return sides[0]


def _require_colors(source: TeacherSource) -> None:
    for key, values in (("mean", source.mean), ("std", source.std)):
        numbers = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
        allowed = "greater than 0 and at most 1" if key == "std" else "from 0 to 1"
        fits = numbers and all(v <= 1 and (v > 0 or (v == 0 and key == "mean")) for v in values)
        if not fits or len(values) != 3:
            expected = f"three numbers, for red, green and blue, {allowed} (for pixels from 0 to 1, not to 255)"
            raise ConfigError(f"teacher {source.name}: preprocess_cfg.{key} is {values!r}; it must be {expected}")


def _folder_source(folder: Path) -> TeacherSource:
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        raise ConfigError(
            f"teacher {folder} does not contain {CONFIG_NAME}; give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            f"or {SCHEME}ARCH/WEIGHTS"
        )
    try:
        config = json.loads(config_file.read_text())
        model_config, _ = config["model_cfg"], config["model_cfg"]["vision_cfg"]["image_size"]
        preprocess = config.get("preprocess_cfg", {})
        mean, std = preprocess.get("mean", OPENAI_MEAN), preprocess.get("std", OPENAI_STD)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"teacher {config_file} cannot be used ({type(error).__name__}: {error}); it must be a JSON object with "
            "model_cfg and preprocess_cfg, as open_clip writes it"
        ) from error
    return TeacherSource(str(config_file), model_config, folder / WEIGHTS_NAME, mean, std)


def _named_source(name: str) -> TeacherSource:
    architecture, _, weights = name.removeprefix(SCHEME).partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None or not weights:
        known = "is one of open_clip.list_models()" if config is None else f"is {architecture}"
        raise ConfigError(f"teacher {name}: expected {SCHEME}ARCH/WEIGHTS, where ARCH {known} and WEIGHTS is a file")
    if Path(weights).is_file():
        return TeacherSource(name, config, Path(weights), OPENAI_MEAN, OPENAI_STD)
    if not open_clip.get_pretrained_cfg(architecture, weights):
        raise ConfigError(f"teacher {name}: the weights file {weights} does not exist")
    raise ConfigError(
        f"teacher {name}: {weights} is a tag whose weights open_clip would download, and medalign downloads nothing; "
        f"download the weights first and give the file: {SCHEME}{architecture}/PATH"
    )
