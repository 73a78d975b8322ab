"""Where a teacher comes from: a folder in the layout of open_clip's hub models, or one of its architectures by name.

Everything that can be told from the configuration alone is checked here, before any weight is read.
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

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
SCHEME = "open_clip:"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Source:
    """Where a teacher comes from: its architecture, its weights' file, its preprocessing."""

    name: str  # of what says so, for errors
    model_config: dict[str, Any]
    weights: Path
    mean: Sequence[float]
    std: Sequence[float]


def find(path: str | Path) -> Source:
    """The source that a path or a name stands for, checked. Raises ConfigError naming the file and the key."""
    source = _named_source(str(path)) if str(path).startswith(SCHEME) else _folder_source(Path(path))
    _require_vision(source)
    _require_colours(source)
    return source


def teacher_eye(path: str | Path) -> tuple[int, Sequence[float], Sequence[float]]:
    """Pixels a side, mean and standard deviation of a teacher's pictures; its weights are not read."""
    source = find(path)
    return _side(source, "image_size"), source.mean, source.std


def _require_vision(source: Source) -> None:
    """Raise ConfigError for a tower that is of no supported kind, or whose patches do not tile its pictures."""
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
            f"{where}: model_cfg.vision_cfg.pool_type is {vision['pool_type']!r}: its class token, whose attention the "
            "student is to learn, was not trained to look anywhere; supported: 'tok'"
        )
    image, patch = _side(source, "image_size"), _side(source, "patch_size")
    if image % patch:
        raise ConfigError(
            f"{where}: its image size {image} is not a multiple of its patch size {patch}: the patches would cover "
            f"{image // patch * patch} of {image} pixels, and none would lie where the student's does"
        )


def _side(source: Source, key: str) -> int:
    """One side, in pixels, of what must be square."""
    size = source.model_config["vision_cfg"].get(key, getattr(open_clip.CLIPVisionCfg, key))
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise ConfigError(
            f"teacher {source.name}: model_cfg.vision_cfg.{key} is {size!r}; supported: squares of whole pixels"
        )
    return sides[0]


def _require_colours(source: Source) -> None:
    for key, values in (("mean", source.mean), ("std", source.std)):
        numbers = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
        low = "above 0" if key == "std" else "from 0"
        fits = numbers and all(v <= 1 and (v > 0 or (v == 0 and key == "mean")) for v in values)
        if not fits or len(values) != 3:
            wanted = f"three numbers, of red, green and blue, {low} to 1 (of pixels from 0 to 1, not to 255)"
            raise ConfigError(f"teacher {source.name}: preprocess_cfg.{key} is {values!r}; it must be {wanted}")


def _folder_source(folder: Path) -> Source:
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        raise ConfigError(
            f"teacher {folder}: no {CONFIG_NAME} there; give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            f"or {SCHEME}ARCH/WEIGHTS"
        )
    try:
        config = json.loads(config_file.read_text())
        model_config, _ = config["model_cfg"], config["model_cfg"]["vision_cfg"]["image_size"]
        preprocess = config.get("preprocess_cfg", {})
        mean, std = preprocess.get("mean", OPENAI_MEAN), preprocess.get("std", OPENAI_STD)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"teacher {config_file} cannot be used ({type(error).__name__}: {error}); open_clip writes one with "
            "model_cfg and preprocess_cfg"
        ) from error
    return Source(str(config_file), model_config, folder / WEIGHTS_NAME, mean, std)


def _named_source(name: str) -> Source:
    architecture, _, weights = name.removeprefix(SCHEME).partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None or not weights:
        known = "one of open_clip.list_models()" if config is None else architecture
        raise ConfigError(f"teacher {name}: expected {SCHEME}ARCH/WEIGHTS with ARCH {known} and WEIGHTS a file")
    if Path(weights).is_file():
        return Source(name, config, Path(weights), OPENAI_MEAN, OPENAI_STD)
    if not open_clip.get_pretrained_cfg(architecture, weights):
        raise ConfigError(f"teacher {name}: there is no weights file {weights}")
    raise ConfigError(
        f"teacher {name}: {weights} is a tag that open_clip would fetch from the net, and nothing is fetched here; "
        f"download it first and name the file: {SCHEME}{architecture}/PATH"
    )
