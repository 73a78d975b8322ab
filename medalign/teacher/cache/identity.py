"""What a cache of targets was made with. It is read only for the same teacher and the same pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medalign.config.keys import flatten
from medalign.config.schema.teacher import TeacherSettings
from medalign.errors import ConfigError
from medalign.geometry import PreprocessCfg
from medalign.teacher.lexicon import PACKAGED, Lexicon, read_lexicon
from medalign.teacher.source import TeacherSource, find_teacher
from medalign.teacher.towers import tower_class

NAME = "targets.json"
DIGEST_BYTES = 16
_FORMAT = 1
_WEIGHT_FILES = ("*.safetensors", "*.bin")  # in a folder of transformers
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def describe(
    settings: TeacherSettings, dtype: torch.dtype, canvas_color: tuple[int, int, int], decoded_for: int
) -> dict[str, Any]:
    """Describe a teacher and the geometry of its images, as JSON. The files of weights are read once, not loaded.

    Args:
        settings: those of the teacher.
        dtype: data type of its weights.
        canvas_color: the color that pads a canvas.
        decoded_for: pixels per side for which images are decoded (large JPEGs are decoded at reduced scale).

    Raises:
        ConfigError: the source is not valid.
    """
    source = find_teacher(settings.path, settings.mean, settings.std)
    size = tower_class(source).check(source)
    lexicon = read_lexicon(settings.lexicon or PACKAGED) if settings.text_weight > 0 else None
    return {
        "format": _FORMAT,
        "teacher": {
            "kind": source.kind,
            "configuration": _hash_json(source.config),
            "weights": _weights(source, settings.random_weights_seed),
            "features": settings.features,
            "attention": settings.attention,
            "precision": _PRECISIONS[dtype],
        },
        "geometry": {
            "size": size,
            "mean": list(source.mean),
            "std": list(source.std),
            "resample": PreprocessCfg.resample.name,
            "canvas_color": list(canvas_color),
            "decoded_for": decoded_for,
        },
        "prompts": None if lexicon is None else _hash_prompts(lexicon),
    }


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path, *, extend: bool) -> None:
    """Check that a cache was made with what is expected now.

    Args:
        found: the description in the cache.
        expected: the description of now.
        folder: the cache.
        extend: whether images are added. Otherwise prompts count only where both have them: `CachedTeacher` refuses a
            cache without them by itself, and a run may ignore them.

    Raises:
        ConfigError: it was not; the message gives the first difference and the remedy.
    """
    before, now = flatten(found), flatten(expected)
    for key, value in now.items():
        optional = key == "prompts" and not extend and None in (value, before.get(key))
        if before.get(key) != value and not optional:
            raise ConfigError(
                f"teacher.cache {folder} has other targets: its {key} is {_short(before.get(key))}, but it is "
                f"{_short(value)} now. Restore what it was made with, or make a cache in another folder with medalign "
                "targets"
            )


def canvas_digest(canvas: Image.Image) -> bytes:
    """Return the key of a canvas: a hash of its size, mode and pixels, DIGEST_BYTES long."""
    digest = hashlib.blake2b(f"{canvas.mode} {canvas.size}".encode(), digest_size=DIGEST_BYTES)
    digest.update(canvas.tobytes())
    return digest.digest()


def _weights(source: TeacherSource, seed: int | None) -> str:
    """Return a hash of the files of weights, or the seed that takes their place."""
    if seed is not None:
        return f"random, seed {seed}"
    files = [source.weights]
    if source.weights.is_dir():
        files = sorted(file for pattern in _WEIGHT_FILES for file in source.weights.glob(pattern))
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(
            f"teacher weights {missing[0]} do not exist; teacher.cache is compared with them: restore them"
        )
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _hash_prompts(lexicon: Lexicon) -> str:
    # The order counts: the cache numbers the findings.
    return _hash_json([[name, finding.present, finding.absent] for name, finding in lexicon.findings.items()])


def _hash_json(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    """Show a value; of a hash, its beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
