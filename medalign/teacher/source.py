"""Where a teacher comes from: a folder of open_clip or of transformers, or an open_clip architecture and a file.

A `TeacherSource` holds what the configuration files say. No weights are read here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from medalign.errors import ConfigError

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
_TORCH_WEIGHTS_NAME = "open_clip_pytorch_model.bin"  # in folders from before open_clip wrote safetensors
_HF_CONFIG_NAME, _HF_IMAGE_NAMES = "config.json", ("preprocessor_config.json", "processor_config.json")
SCHEME, BIOVIL_SCHEME, PMC_CLIP_SCHEME = "open_clip:", "biovil:", "pmc_clip:"
_OPENAI_MEAN, _OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_ZEROS, _ONES = [0.0] * 3, [1.0] * 3  # BioViL takes pixels from 0 to 1 as they are

Colors = Sequence[float]  # one number per channel: red, green, blue


@dataclass(frozen=True)
class TeacherSource:
    """Architecture, weights and normalization of a teacher."""

    name: str  # the configuration file or the name given by the user, for error messages
    kind: str  # key of `towers.TOWERS`
    config: dict[str, Any]  # model_cfg of open_clip, or config.json of transformers
    weights: Path  # the file of weights, or the folder of transformers
    mean: Colors
    std: Colors

    def require_whole_patches(self, image: int, patch: int) -> int:
        """Return the image size in pixels. Raises ConfigError if the patches do not cover the image exactly."""
        if image % patch:
            raise ConfigError(
                f"teacher {self.name}: its image size {image} is not a multiple of its patch size {patch}: the patches "
                f"would cover only {image // patch * patch} of {image} pixels and would not align with the student's "
                "patches"
            )
        return image


def find_teacher(path: str | Path, mean: Colors | None = None, std: Colors | None = None) -> TeacherSource:
    """Resolve a path or a name to a teacher's source.

    Args:
        path: a folder, `open_clip:ARCH/WEIGHTS`, `biovil:WEIGHTS` or `pmc_clip:WEIGHTS`.
        mean: the normalization's mean per channel, for pixels from 0 to 1; None takes the folder's.
        std: the normalization's standard deviation per channel; None takes the folder's.

    Raises:
        ConfigError: the source is not valid; the message names the file and the key.
    """
    if str(path).startswith(SCHEME):
        return _named_source(str(path), mean, std)
    if str(path).startswith(BIOVIL_SCHEME):
        file = Path(str(path).removeprefix(BIOVIL_SCHEME))
        colors = _colors(str(path), "", (_ZEROS, _ONES), (mean, std))
        return TeacherSource(str(path), "biovil", {}, file, *colors)
    if str(path).startswith(PMC_CLIP_SCHEME):
        colors = _colors(str(path), "", (None, None), (mean, std))
        return TeacherSource(str(path), "pmc_clip", {}, Path(str(path).removeprefix(PMC_CLIP_SCHEME)), *colors)
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"the teacher {folder} {'is not a folder' if folder.exists() else 'does not exist'}; models are read only "
            "from disk: download one first and give its folder"
        )
    if (folder / CONFIG_NAME).is_file():
        return _open_clip_folder(folder, mean, std)
    if (folder / _HF_CONFIG_NAME).is_file():
        return _transformers_folder(folder, mean, std)
    raise ConfigError(
        f"teacher {folder} contains neither {CONFIG_NAME} nor {_HF_CONFIG_NAME}; give a folder with {CONFIG_NAME} and "
        f"{WEIGHTS_NAME}, the folder of a vision model of transformers, {SCHEME}ARCH/WEIGHTS, "
        f"{BIOVIL_SCHEME}WEIGHTS or {PMC_CLIP_SCHEME}WEIGHTS"
    )


def _open_clip_folder(folder: Path, mean: Colors | None, std: Colors | None) -> TeacherSource:
    file = folder / CONFIG_NAME
    config = _read_object(file)
    try:
        model_config, vision = config["model_cfg"], config["model_cfg"]["vision_cfg"]
        _ = vision["image_size"]
        preprocess = config.get("preprocess_cfg", {})
        own_mean, own_std = preprocess.get("mean"), preprocess.get("std")
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"teacher {file} cannot be used ({type(error).__name__}: {error}); it must be a JSON object with "
            "model_cfg and preprocess_cfg, as open_clip writes it"
        ) from error
    colors = _colors(str(file), "preprocess_cfg.", (own_mean, own_std), (mean, std))
    torch_weights = folder / _TORCH_WEIGHTS_NAME
    weights = folder / WEIGHTS_NAME
    if not weights.is_file() and torch_weights.is_file():
        weights = torch_weights
    return TeacherSource(str(file), _open_clip_kind(vision), model_config, weights, *colors)


def _named_source(name: str, mean: Colors | None, std: Colors | None) -> TeacherSource:
    architecture, _, weights = name.removeprefix(SCHEME).partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None or not weights:
        known = "is one of open_clip.list_models()" if config is None else f"is {architecture}"
        raise ConfigError(f"teacher {name}: expected {SCHEME}ARCH/WEIGHTS, where ARCH {known} and WEIGHTS is a file")
    if not Path(weights).is_file():
        if not open_clip.get_pretrained_cfg(architecture, weights):
            raise ConfigError(f"teacher {name}: the weights file {weights} does not exist")
        raise ConfigError(
            f"teacher {name}: {weights} is a tag whose weights open_clip would download, and medalign downloads "
            f"nothing; download the weights first and give the file: {SCHEME}{architecture}/PATH"
        )
    colors = _colors(name, "", (None, None), (mean, std))
    return TeacherSource(name, _open_clip_kind(config["vision_cfg"]), config, Path(weights), *colors)


def _transformers_folder(folder: Path, mean: Colors | None, std: Colors | None) -> TeacherSource:
    file = folder / _HF_CONFIG_NAME
    config = _read_object(file)
    image_file = next((folder / name for name in _HF_IMAGE_NAMES if (folder / name).is_file()), None)
    image = _read_object(image_file) if image_file else {}
    nested = image.get("image_processor")  # processor_config.json holds the image settings under this key
    image = nested if isinstance(nested, dict) else image
    owner = str(image_file or file)
    colors = _colors(owner, "image_", (image.get("image_mean"), image.get("image_std")), (mean, std))
    return TeacherSource(str(file), str(config.get("model_type")), config, folder, *colors)


def _open_clip_kind(vision: dict[str, Any]) -> str:
    if vision.get("timm_model_name"):
        return "timm"
    return "resnet" if isinstance(vision.get("layers"), Sequence) else "open_clip"


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"teacher {file} cannot be used ({type(error).__name__}: {error}); it must be a JSON object, as its "
            "library writes it"
        ) from error
    return values


def _colors(
    owner: str, prefix: str, own: tuple[Any, Any], given: tuple[Colors | None, Colors | None]
) -> tuple[Colors, Colors]:
    """Choose mean and standard deviation: those given by the user, otherwise the source's own.

    Raises:
        ConfigError: there is none, or it is not three numbers for pixels from 0 to 1.
    """
    keys = ("mean", "std")
    values = [ours if theirs is None else theirs for ours, theirs in zip(own, given, strict=True)]
    if unknown := [key for key, value in zip(keys, values, strict=True) if value is None]:
        settings = " and ".join(f"teacher.{key}" for key in unknown)
        raise ConfigError(
            f"teacher {owner} does not give the normalization of its pixels; set {settings} to what it was trained "
            f"with (OpenAI's CLIP: mean {_OPENAI_MEAN}, std {_OPENAI_STD})"
        )
    for key, value, theirs in zip(keys, values, given, strict=True):
        _check_color(f"{owner}: {prefix if theirs is None else 'teacher.'}{key}", value, zero=key == "mean")
    return values[0], values[1]


def _check_color(where: str, values: Any, *, zero: bool) -> None:
    """Raise ConfigError unless the values are three numbers from 0 (excluded unless `zero`) to 1."""
    numbers = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != 3 or not all(v <= 1 and (v > 0 or (v == 0 and zero)) for v in values):
        allowed = "from 0 to 1" if zero else "greater than 0 and at most 1"
        raise ConfigError(
            f"teacher {where} is {values!r}; it must be three numbers, for red, green and blue, {allowed} (for pixels "
            "from 0 to 1, not to 255)"
        )
