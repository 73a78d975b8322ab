"""BioViL's image model: a teacher for the spatial loss only. Small models with fewer blocks, on smaller images."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from medalign.config import Config
from medalign.contracts import StudentOutput
from medalign.errors import CheckpointError, ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.losses.attention import AttentionTerm
from medalign.losses.token_similarity import SimilarityTerm
from medalign.teacher.loading import load_teacher, read_preprocess_cfg, require_attention
from medalign.teacher.sinks import SinkMonitor
from medalign.teacher.targets import teacher_targets
from medalign.teacher.towers import biovil
from tests import tiny
from tests.unit.teacher.towers.cases import sharpen

SIZE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(biovil, "BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(biovil, "SIZE", SIZE)


@pytest.fixture(params=["BioViL", "BioViL-T"])
def published(request, tmp_path):
    """Weights under the names of hi-ml's image model, and its outputs: patches before and after the projector."""
    temporal = request.param == "BioViL-T"
    resnet = ResNet(Bottleneck, [1, 1, 1, 1])
    to_vit = nn.Conv2d(2048, 256, 1, bias=False)
    missing = nn.Parameter(torch.randn(1, 256, 1, 1))
    width = 512 if temporal else 2048
    first, last = nn.Conv2d(width, 128, 1, bias=False), nn.Conv2d(128, 128, 1)
    projector = nn.Sequential(first, nn.BatchNorm2d(128), nn.ReLU(), last)
    for part in (resnet, to_vit, projector):
        sharpen(part)
    state = {f"encoder.encoder.{key}": value for key, value in resnet.state_dict().items()}
    state |= {f"projector.model.{key}": value for key, value in projector.state_dict().items()}
    if temporal:
        state |= {"encoder.backbone_to_vit.weight": to_vit.weight, "encoder.missing_previous_emb": missing}
        state["encoder.vit_pooler.pos_drop"] = torch.zeros(1)
    torch.save(state, tmp_path / "biovil.pt")
    resnet.avgpool = resnet.fc = nn.Identity()

    def outputs(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = resnet(pixels).unflatten(1, (2048, 2, 2))
        if temporal:
            before = torch.cat([to_vit(before), missing.repeat(len(pixels), 1, 2, 2)], dim=1)
        return before.flatten(2).transpose(1, 2), projector(before).flatten(2).transpose(1, 2)

    return tmp_path / "biovil.pt", state, outputs


@torch.no_grad()
def test_features_equal_those_of_the_model(published):
    file, _, outputs = published
    pixels = torch.rand(2, 3, SIZE, SIZE)
    before, after = outputs(pixels)
    teacher = load_teacher(f"biovil:{file}")
    assert (
        teacher.preprocess_cfg == PreprocessCfg(SIZE, (0.0,) * 3, (1.0,) * 3) == read_preprocess_cfg(f"biovil:{file}")
    )
    assert (teacher.grid, teacher.width) == (PatchGrid(2, 2), 128)
    features, attention = teacher(pixels)
    assert attention is None
    torch.testing.assert_close(features, after, rtol=1e-4, atol=1e-5 * float(after.abs().max()))
    raw = load_teacher(f"biovil:{file}", features="before_norm")
    assert raw.width == before.shape[-1]
    torch.testing.assert_close(raw(pixels)[0], before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_weights_must_fit_exactly(published):
    file, state, _ = published
    torch.save({key: value for key, value in state.items() if key != "projector.model.3.bias"}, file)
    with pytest.raises(CheckpointError, match=r"1 missing: projector\.model\.3\.bias"):
        load_teacher(f"biovil:{file}")
    torch.save(state | {"encoder.more.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 unexpected: encoder\.more\.weight"):
        load_teacher(f"biovil:{file}")


def test_the_untrained_control_has_the_same_shapes(published):
    file, _, _ = published
    first, again = (load_teacher(f"biovil:{file}", random_weights_seed=3) for _ in range(2))
    pixels = torch.rand(1, 3, SIZE, SIZE)
    assert torch.equal(first(pixels)[0], again(pixels)[0]) and first.width == load_teacher(f"biovil:{file}").width


def test_losses_that_need_attention_are_refused_by_name(tmp_path, teacher_folder):
    config = Config()
    config.teacher.path = f"biovil:{tmp_path / 'biovil.pt'}"
    config.losses.beta = 0.06
    with pytest.raises(ConfigError, match=r"losses\.beta is 0\.06, but teacher biovil:.* set it to 0, or teacher"):
        require_attention(config)
    config.losses.beta = 0.0
    require_attention(config)
    config.losses.weighting = "teacher_attention"
    with pytest.raises(ConfigError, match=r"losses\.weighting is teacher_attention, .* set it to uniform"):
        require_attention(config)
    config.teacher.path = str(teacher_folder)
    require_attention(config)


def test_the_spatial_loss_works_without_attention(published):
    """The attention loss reports nothing, and the monitor of sinks sees nothing."""
    file, _, _ = published
    targets = teacher_targets(load_teacher(f"biovil:{file}"), torch.rand(2, 3, SIZE, SIZE), PatchGrid(4, 4))
    assert targets.attention is None and targets.features.shape == (2, 16, 128)
    batch, monitor = tiny.batch(), SinkMonitor()
    tokens, attention = torch.randn(2, 16, 8, requires_grad=True), torch.rand(2, 16)
    output = StudentOutput(torch.zeros(1), torch.zeros(1), tokens, attention)
    SimilarityTerm(1.0).compute(output, targets, batch).sum.backward()
    assert tokens.grad.abs().sum() > 0
    assert AttentionTerm(0.0).compute(output, targets, batch) is None
    with pytest.raises(ValueError, match="the teacher has no attention"):
        SimilarityTerm(1.0, weighting="teacher_attention").compute(output, targets, batch)
    monitor(targets, batch)
    assert not monitor._seen
