"""Attention rollout equals the product of the matrices that the models' own attention gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from medalign.config import Config, TeacherConfig
from medalign.errors import ConfigError
from medalign.teacher.loading import load_teacher, require_attention
from tests.unit.teacher.towers.cases import CASES, SIZE


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def matrices_open_clip(visual: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def record(block: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        normed = block.ln_1(inputs[0])
        found.append(block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)[1])

    handles = [block.register_forward_pre_hook(record) for block in visual.transformer.resblocks]
    visual(pixels)
    for handle in handles:
        handle.remove()
    return found


def matrices_timm(visual: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for block in visual.trunk.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].mean(1)))
    visual.trunk.forward_features(pixels)
    return found


def matrices_transformers(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    output = getattr(model, "vision_model", model)(pixels, output_attentions=True)
    return [matrix.mean(1) for matrix in output.attentions]


KINDS: dict[str, tuple[Callable[[Any, torch.Tensor], list[torch.Tensor]], int]] = {
    "open_clip": (matrices_open_clip, 1),
    "timm with registers, norms of queries and keys, layer scale": (matrices_timm, 3),
    "transformers CLIP": (matrices_transformers, 1),
    "transformers DINOv2 (RAD-DINO)": (matrices_transformers, 1),
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_rollout_equals_the_product_of_the_eager_matrices(name, tmp_path, pixels):
    case, (matrices, prefix) = next(case for case in CASES if case.name == name), KINDS[name]
    product = None
    found = matrices(case.write(tmp_path / "teacher"), pixels)
    assert len(found) == 3
    for matrix in found:
        mixed = (matrix + torch.eye(matrix.shape[1])) / 2
        product = mixed if product is None else mixed @ product
    teacher, plain = load_teacher(tmp_path / "teacher", attention="rollout"), load_teacher(tmp_path / "teacher")
    features, attention = teacher(pixels)
    assert attention.dtype == torch.float32 and torch.equal(features, plain(pixels)[0])
    # Rounding of float32, from other orders of addition in every block.
    torch.testing.assert_close(attention, product[:, 0, prefix:], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(attention, plain(pixels)[1], rtol=0.1)
    assert torch.equal(attention, teacher(pixels)[1])  # nothing of the last run is left


@pytest.mark.parametrize("name", ["transformers SigLIP (MedSigLIP)", "timm (SigLIP)"])
def test_a_tower_without_a_class_token_is_refused_before_weights_are_read(name, tmp_path):
    next(case for case in CASES if case.name == name).write(tmp_path / "teacher")
    for weights in (tmp_path / "teacher").glob("*.safetensors"):
        weights.unlink()
    message = "has no class token, .* set it to last_block"
    with pytest.raises(ConfigError, match=message):
        load_teacher(tmp_path / "teacher", attention="rollout")
    with pytest.raises(ConfigError, match=message):  # as in `medalign inspect`
        require_attention(Config(teacher=TeacherConfig(path=str(tmp_path / "teacher"), attention="rollout")))


def test_rollout_is_refused_with_a_compiled_tower(folder):
    with pytest.raises(ConfigError, match=r"teacher\.compile is true"):
        load_teacher(folder, attention="rollout", compile=True)
