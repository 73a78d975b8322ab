import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.open_clip_vit import build_clip

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    "conv_stem": [8, 12],
}


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """Write a complete open_clip model with random weights, with the layout of open_clip's hub models."""

    def write(name: str = "teacher", **changes) -> Path:
        config = {**MODEL, **changes}
        torch.manual_seed(0)
        model = build_clip(config)
        folder = tmp_path / name
        folder.mkdir()
        save_file(model.state_dict(), folder / WEIGHTS_NAME)
        preprocess = {"size": 48, "mean": [0.4] * 3, "std": [0.2] * 3}
        (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
        return folder

    return write


@pytest.fixture
def folder(make_folder) -> Path:
    return make_folder()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))
