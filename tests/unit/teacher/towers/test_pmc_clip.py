"""A file in the layout of PMC-CLIP's checkpoints gives the tower that its weights describe, or a named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medalign.errors import CheckpointError, ConfigError
from medalign.geometry import PatchGrid
from medalign.teacher.loading import load_teacher
from medalign.teacher.towers.open_clip_vit import build_clip
from tests.unit.teacher.towers.cases import eager_resnet, sharpen

COLORS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
OTHERS = ("text_encoder.pooler.dense.weight", "fusion_module.resblocks.0.ln_1.weight", "mlm_projection", "logit_scale")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The tower, and a checkpoint of a training on several GPUs: optimizer, text tower and fusion module beside it."""
    vision = {"image_size": 96, "layers": [1, 2, 1, 1], "width": 8}
    visual = sharpen(build_clip({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}).visual)
    state = {f"module.visual.{name}": value for name, value in visual.state_dict().items()}
    state |= {f"module.{name}": torch.zeros(2) for name in OTHERS}
    file = tmp_path_factory.mktemp("pmc") / "checkpoint.pt"
    torch.save({"epoch": 3, "name": "RN50_fusion4", "state_dict": state, "optimizer": {"lr": 1e-4}}, file)
    return visual, file


@torch.no_grad()
def test_features_and_attention_are_those_of_the_published_tower(published):
    visual, file = published
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(f"pmc_clip:{file}", **COLORS)
    assert (teacher.grid, teacher.width, teacher.preprocess_cfg.size) == (PatchGrid(3, 3), 256, 96)
    for found, expected in zip(teacher(pixels), eager_resnet(visual, pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_the_file_does_not_hold_is_refused_by_name(published, tmp_path):
    _, file = published
    with pytest.raises(ConfigError, match=r"set teacher\.mean and teacher\.std"):
        load_teacher(f"pmc_clip:{file}")
    with pytest.raises(ConfigError, match=r"text tower is not read; set teacher\.text_weight to 0"):
        load_teacher(f"pmc_clip:{file}", **COLORS, text_weight=0.5)
    content = torch.load(file, weights_only=True)
    plain = {name: value for name, value in content["state_dict"].items() if "attnpool" not in name}
    torch.save({"state_dict": plain}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"no visual\.attnpool\.positional_embedding: .* ModifiedResNet"):
        load_teacher(f"pmc_clip:{tmp_path / 'plain.pt'}", **COLORS)
    del content["state_dict"]["module.visual.layer2.1.conv1.weight"]
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.layer2\.1\.conv1\.weight"):
        load_teacher(f"pmc_clip:{tmp_path / 'short.pt'}", **COLORS)
