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


@dataclass(frozen=True)
class Case:
    """How to make a model, and the settings of a student of it."""

    save: Callable[[Path], Path]
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path, **changes: Any) -> StudentConfig:
        """The settings of a student, with block 2 tapped unless the case says otherwise."""
        lora = LoraConfig(rank=4, alpha=8)
        return StudentConfig(**{"path": str(folder), "layer": 2, "lora": lora, **self.settings, **changes})


CASES = {
    "llava": Case(tiny.save_student),
}
