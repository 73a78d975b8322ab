"""The towers take the weights of the published models: every name and shape, on the meta device."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from medalign.errors import CheckpointError
from medalign.teacher.source import SCHEME, TeacherSource, find_teacher
from medalign.teacher.towers.open_clip_vit import build_visual
from medalign.teacher.weights import load_exactly

FILE = Path("published.pt")


def weights(parameters: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors without storage under the published names, without the prefix of DistributedDataParallel."""
    found = {}
    for entry in parameters:
        first, last = map(int, entry.get("i", "0..0").split(".."))
        for number in range(first, last + 1):
            name = entry["name"].removeprefix("module.").replace("{i}", str(number))
            found[name] = torch.empty(entry["shape"], device="meta")
    return found


def facts(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "models" / f"teacher-{name}.json").read_text())


def meta_visual(tmp_path: Path, architecture: str) -> Any:
    file = tmp_path / "weights.pt"
    file.touch()
    source = find_teacher(f"{SCHEME}{architecture}/{file}", (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        return build_visual(source)


def check_both_directions(visual: Any, state: dict[str, torch.Tensor]) -> None:
    load_exactly(visual, state, FILE)
    spared = next(name for name in state if name.startswith("visual."))
    with pytest.raises(CheckpointError, match=f"1 missing: {re.escape(spared)}"):
        load_exactly(visual, {name: value for name, value in state.items() if name != spared}, FILE)
    with pytest.raises(CheckpointError, match="1 unexpected: fusion"):
        load_exactly(visual, state | {"fusion.weight": torch.empty(1, device="meta")}, FILE)


@pytest.mark.parametrize("file", range(3))
def test_unimed_clip(shared, tmp_path, file):
    published = list(facts(shared, "unimed-clip")["files"].values())[file]
    state = weights(published["parameters"])
    assert len(state) == published["keys_total"]
    check_both_directions(meta_visual(tmp_path, published["architecture name in open_clip"]), state)


def test_biomedclip(shared):
    published = facts(shared, "biomedclip")
    source = TeacherSource("biomedclip", "timm", published["config"]["model_cfg"], FILE, (0.5,) * 3, (0.5,) * 3)
    state = weights(published["parameters"])
    assert len(state) == published["keys_total"]
    with torch.device("meta"):
        visual = build_visual(source)
    check_both_directions(visual, state | {"text.transformer.embeddings.position_ids": torch.empty(1, 512)})


def test_chexzero(shared, tmp_path):
    check_both_directions(
        meta_visual(tmp_path, "ViT-B-32-quickgelu"), weights(facts(shared, "chexzero")["parameters (visual)"])
    )


def test_medsiglip(shared):
    published = facts(shared, "medsiglip")
    state = weights(published["parameters (in memory, 5.23)"])
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**published["config"]["vision_config"]))
    load_exactly(model, state, FILE, prefix="vision_model.", others=("text_model.", "logit_scale", "logit_bias"))


def test_rad_dino(shared):
    published = facts(shared, "rad-dino")
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**published["config"]))
    load_exactly(model, weights(published["parameters (in memory, 5.23)"]), FILE, prefix="", others=())
