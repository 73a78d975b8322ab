"""A teacher whose tower has run before: its targets come from a cache, and its weights are not loaded."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medalign.config.schema.teacher import TeacherSettings
from medalign.errors import ConfigError, DataError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.observability.files import write_text
from medalign.teacher.cache import identity
from medalign.teacher.cache.files import CacheFiles
from medalign.teacher.conditioning import TextConditioning
from medalign.teacher.lexicon import PACKAGED, read_lexicon
from medalign.teacher.model import ATTENTION, FEATURES, NORMS, RELEVANCE, TargetSource, Teacher

_PROMPTS = "prompts.safetensors"
_LAYOUT = "layout"


class CachedView:
    """What a cached teacher reads of a canvas: its outputs on the teacher's grid, by name.

    Args:
        files: the cache.
        size: pixels per side of the teacher's input.
        shapes: shape of each tensor that is read.
    """

    def __init__(self, files: CacheFiles, size: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.size = size
        self._files = files
        self._shapes = shapes

    def inputs(self, canvas: Image.Image, where: str = "") -> Mapping[str, torch.Tensor]:
        """Read the outputs for a canvas. Raises DataError if there are none."""
        found = self._files.read(identity.canvas_digest(canvas), self._shapes)
        if found is None:
            raise DataError(
                f"{where}: teacher.cache {self._files.folder} has no targets for an image of this sample; run medalign "
                "targets with these shards again"
            )
        return found

    def blank(self) -> Mapping[str, torch.Tensor]:
        """Return zeros and equal attention to all patches, for the image of weight 0."""
        zeros = {name: torch.zeros(shape, dtype=_dtype(name)) for name, shape in self._shapes.items()}
        return {name: value + 1 / len(value) if name == ATTENTION else value for name, value in zeros.items()}


class CachedTeacher(TargetSource):
    """Gives what `CachedView` has read.

    Args:
        settings: the teacher's settings; `settings.cache` is the folder.

    Raises:
        ConfigError: the folder holds no cache, or one without what the settings need.
        DataError: a file of the cache cannot be read.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        folder = Path(settings.cache)
        content = read(folder)
        geometry, layout = content["geometry"], content[_LAYOUT]
        preprocess = PreprocessCfg(geometry["size"], tuple(geometry["mean"]), tuple(geometry["std"]))
        conditioning = _conditioning(folder, settings) if settings.text_weight > 0 else None
        super().__init__(preprocess, PatchGrid(*layout["grid"]), layout["width"], conditioning, settings.mask_sinks)
        shapes: dict[str, tuple[int, ...]] = {FEATURES: (self.grid.size, self.width)}
        if layout[ATTENTION]:
            shapes[ATTENTION] = (self.grid.size,)
            shapes |= {NORMS: (self.grid.size,)} if settings.mask_sinks else {}
        if conditioning is not None:
            shapes[RELEVANCE] = (self.grid.size, 2 * len(conditioning.present))
        self._view = CachedView(CacheFiles(folder), self.preprocess_cfg.size, shapes)

    @property
    def view(self) -> CachedView:
        """The outputs for a canvas."""
        return self._view

    def observe(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what was read."""
        return dict(inputs)


def read(folder: Path) -> dict[str, Any]:
    """Read what a cache was made with. Raises ConfigError if the folder holds no cache."""
    file = folder / identity.NAME
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"teacher.cache {folder} holds no targets ({type(error).__name__}: {error}); make them with "
            "medalign targets"
        ) from error


def begin(folder: Path, expected: Mapping[str, Any], teacher: Teacher) -> None:
    """Prepare a folder for the targets of a teacher, or check that it was prepared for the same one.

    Raises:
        ConfigError: the folder has targets of another teacher.
    """
    if (folder / identity.NAME).is_file():
        identity.require_same(read(folder), expected, folder, extend=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if teacher.conditioning is not None:
        texts = {"present": teacher.conditioning.present.cpu(), "absent": teacher.conditioning.absent.cpu()}
        scratch = folder / f".{_PROMPTS}.{uuid.uuid4().hex}"  # several ranks may begin at once
        save_file(texts, scratch)
        scratch.replace(folder / _PROMPTS)
    layout = {
        "grid": [teacher.grid.rows, teacher.grid.columns],
        "width": teacher.width,
        ATTENTION: teacher.tower.has_attention,
    }
    write_text(folder / identity.NAME, json.dumps({**expected, _LAYOUT: layout}, indent=2) + "\n")


def bytes_per_image(teacher: Teacher) -> int:
    """Return the bytes that the targets of one image take on the disk."""
    values = teacher.width * _dtype(FEATURES).itemsize
    if teacher.tower.has_attention:
        values += (_dtype(ATTENTION).itemsize) + _dtype(NORMS).itemsize
    if teacher.conditioning is not None:
        values += 2 * len(teacher.conditioning.present) * _dtype(RELEVANCE).itemsize
    return teacher.grid.size * values + identity.DIGEST_BYTES


def _conditioning(folder: Path, settings: TeacherSettings) -> TextConditioning:
    """Build the conditioning with the embeddings of the prompts in the cache; the text tower is not loaded."""
    if not (folder / _PROMPTS).is_file():
        raise ConfigError(
            f"teacher.text_weight is {settings.text_weight}, but teacher.cache {folder} was made without "
            "text-conditioned targets; make another one with medalign targets and this setting, or set it to 0"
        )
    texts = load_file(folder / _PROMPTS)
    return TextConditioning(
        read_lexicon(settings.lexicon or PACKAGED),
        texts["present"],
        texts["absent"],
        weight=settings.text_weight,
        temperature=settings.text_temperature,
        absent_weight=settings.text_absent_weight,
        reports=settings.text_reports,
    )


def _dtype(name: str) -> torch.dtype:
    return torch.float16 if name == FEATURES else torch.float32
