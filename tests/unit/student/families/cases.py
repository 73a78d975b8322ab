"""A small model of random weights for each family, in the layout in which the real one is published.

A line in `CASES` gives a family every test of `test_families`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medalign.config import LoraConfig, StudentConfig
from tests import tiny
from tests.unit.student.families import authors, native


@dataclass(frozen=True)
class Case:
    """How to make a model, and the settings of a student of it; "{folder}" in them is the model's folder."""

    save: Callable[[Path], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    tiled: bool = False  # whether the model's own processor gives the whole picture, rounded to 8 bits, and its tiles
    processor: dict[str, Any] = field(default_factory=dict)  # arguments of the model's own processor

    def config(self, folder: Path, **changes: Any) -> StudentConfig:
        """The settings of a student, with block 2 tapped unless the case says otherwise."""
        lora = LoraConfig(rank=4, alpha=8)
        own = {
            name: value.format(folder=folder) if isinstance(value, str) else value
            for name, value in self.settings.items()
        }
        return StudentConfig(**{"path": str(folder), "layer": 2, "lora": lora, **own, **changes})


CASES = {
    "llava": Case(tiny.save_student),
    "llava_mistral": Case(authors.save_llava_med, {"vision_tower": f"{{folder}}/{authors.TOWER}"}),
    "llava_qwen2": Case(authors.save_huatuo),
    "llava_llama": Case(authors.save_llava_llama),
    "gemma3": Case(native.save_gemma3),
    "qwen2_5_vl": Case(native.save_qwen25, {"image_size": 32}),
    "qwen3_vl": Case(native.save_qwen3, {"image_size": 32}),
    "internvl": Case(native.save_internvl, processor={"crop_to_patches": False}),
    "llava_next": Case(native.save_llava_next, tiled=True),
    "llava_onevision": Case(native.save_llava_onevision, tiled=True),
    "llava_siglip": Case(native.save_llava_siglip),
    "llava_dinov2": Case(native.save_llava_dinov2),
}
