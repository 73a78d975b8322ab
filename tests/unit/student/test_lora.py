"""Which layers get an adapter, and how strong it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from medalign.config import LoraConfig, StudentConfig
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny


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


def test_dora_separates_the_norm_of_each_output_from_its_direction(student_folder: Path) -> None:
    """Untrained, it changes nothing. Its magnitudes are the norms of the rows of the weights."""
    plain, dora = (load_student(config(student_folder, dora=on), torch.float32).eval() for on in (False, True))
    batch = tiny.batch()
    with torch.no_grad():
        torch.testing.assert_close(dora(batch).logits, plain(batch).logits, rtol=1e-4, atol=1e-4)
    layer: Any = dora.spec.attentions[1].q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), layer.base_layer.weight.norm(dim=1))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    magnitude.data *= 2
    direction = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    hidden = torch.randn(3, 32)
    expected = hidden @ (magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_lora_does_not_reach_are_reported_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.save_student(tmp_path / "moe", kind=MixtralConfig, num_local_experts=4)
    with caplog.at_level("WARNING", "medalign"):
        check_student(config(folder))
        count = 3 * 4 * (3 * 32 * 64)  # blocks, experts, their three matrices
        message = f"does not reach the experts of the student's mixture: {count} parameters in 6 tensors get no adapter"
        assert [record.getMessage() for record in caplog.records if message in record.getMessage()]
        caplog.clear()
        settings = config(folder)
        settings.train = "full"
        check_student(settings)
        assert not caplog.records
    student = load_student(settings, torch.float32).train()
    student(tiny.batch()).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in student.trainable()["language_model"])
