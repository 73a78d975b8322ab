"""Which layers get an adapter, and how strong it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.student.model import Student


def config(folder: Path, **lora: object) -> StudentConfig:
    return StudentConfig(path=str(folder), layer=1, lora=LoraConfig(**{"rank": 4, "alpha": 8} | lora))  # type: ignore[arg-type]


def adapted(student: Student) -> list[str]:
    """Names inside the model of the layers with an adapter."""
    return sorted(
        name.removesuffix(".lora_A.default") for name, _ in student.named_modules() if name.endswith("lora_A.default")
    )


@pytest.mark.parametrize(
    ("targets", "per_block"),
    [("", 7), ("self_attn", 4), ("(q|v)_proj", 2), (r"^mlp\.", 3), ("^down_proj", 0), ("layers", 0)],
)
def test_a_pattern_chooses_layers_of_each_block(student_folder: Path, targets: str, per_block: int) -> None:
    settings = config(student_folder, targets=targets)
    if not per_block:
        with pytest.raises(
            ConfigError, match="matches no linear layer of a block; they are mlp.down_proj, mlp.gate_proj"
        ):
            load_student(settings, torch.float32)
        return
    names = adapted(load_student(settings, torch.float32))
    assert len(names) == 3 * per_block
    assert all(".language_model.layers." in name for name in names)


def test_a_pattern_that_is_none_is_refused_before_weights_are_read(student_folder: Path) -> None:
    for targets in ("(", "^nothing$"):
        with pytest.raises(ConfigError, match="student.lora.targets"):
            check_student(config(student_folder, targets=targets))


def test_rank_stabilized_adapters_are_scaled_by_the_root_of_the_rank(student_folder: Path) -> None:
    plain, stable = (load_student(config(student_folder, rank_stabilized=on), torch.float32) for on in (False, True))
    ratios = [
        layer.scaling["default"] / other.scaling["default"]
        for layer, other in zip(stable.modules(), plain.modules(), strict=True)
        if hasattr(layer, "lora_A")
    ]
    assert ratios and all(ratio == pytest.approx(4**0.5) for ratio in ratios)
