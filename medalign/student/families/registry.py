"""The families by model type, and the models that cannot be students, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medalign.errors import ConfigError
from medalign.student.families.base import Family, ModelSpec

FAMILIES: dict[str, Family] = {}

_NO_GRID = "the tokens of an image have no fixed places on a grid"
_REFUSED = {
    "mllama": "the image is not a part of its sequence: W on image tokens and the attention to them do not exist",
    "hulumed_qwen2": f"it needs code of its own, and {_NO_GRID}",
    "hulumed_qwen3": f"it needs code of its own, and {_NO_GRID}",
    "chexagent": f"it needs code of its own, and {_NO_GRID}",
    "maira2": "it needs code of its own; a LLaVA with a DINOv2 tower and a projector of two layers is supported",
    "qwen3_vl_moe": "LoRA does not reach the experts of a mixture, which are no linear layers; choose a dense one",
    "internvl_chat": "it needs code of its own; choose the conversion to the transformers format (InternVL3-...-hf)",
}


def register(family: type[Family]) -> type[Family]:
    """Make a family known, as a decorator of its class."""
    FAMILIES[family.model_type] = family()
    return family


def inspect_model(model: Any) -> ModelSpec:
    """Return the spec of a transformers model.

    Raises:
        ConfigError: the model's family is not supported.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise _unsupported(kind)
    return FAMILIES[kind].inspect(model)


def find_family(folder: Path, values: dict[str, Any]) -> Family:
    """Return the family of a folder.

    Args:
        folder: the model's folder.
        values: its config.json.

    Raises:
        ConfigError: no family can read it.
    """
    for family in FAMILIES.values():
        if family.claims(values):
            return family
    if "model_type" not in values:
        raise ConfigError(
            f"student.path {folder} cannot be read as a model: its config.json has no model_type; copy the model's "
            "file again"
        )
    raise _unsupported(values["model_type"], "auto_map" in values)


def _unsupported(kind: str, needs_code: bool = False) -> ConfigError:
    reason = _REFUSED.get(kind, "it needs code from its folder, which is never run" if needs_code else "")
    return ConfigError(
        f"student model type {kind!r} is not supported{reason and f' ({reason})'}; supported: "
        f"{', '.join(sorted(FAMILIES))}"
    )
