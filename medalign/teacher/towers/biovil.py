"""BioViL's and BioViL-T's image model: a ResNet-50 with projected patches. It has no attention to distill.

The layout is that of Microsoft's hi-ml. BioViL-T compares a film with an earlier one; without an earlier film it puts a
learned vector in the place of the comparison, which is what a teacher does here.

Shape suffixes: I images, h and w cells of the feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from typing_extensions import override

from medalign.geometry import PatchGrid
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.base import Streams, Tower
from medalign.teacher.weights import load_exactly, read_weights

SIZE, STRIDE = 448, 32  # pixels of the input, and per cell of the feature map
BLOCKS = (3, 4, 6, 3)
_WIDTH, _FUSED, _JOINT = 2048, 256, 128  # the ResNet's features, BioViL-T's per film, and the joint space
_TEMPORAL = "encoder.backbone_to_vit."
# Parts without use here: ImageNet's classifier, the comparison of two films, classifiers of findings.
_OTHERS = ("encoder.encoder.fc.", "encoder.vit_pooler.", "classifier.")


class _Encoder(nn.Module):
    """The ResNet, and BioViL-T's parts after it; names are those of the published weights."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.encoder = ResNet(Bottleneck, list(BLOCKS))
        del self.encoder.fc
        self.backbone_to_vit = nn.Conv2d(_WIDTH, _FUSED, 1, bias=False) if temporal else None
        self.missing_previous_emb = nn.Parameter(torch.zeros(1, _FUSED, 1, 1)) if temporal else None


class _Projector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        first = nn.Conv2d(width, _JOINT, 1, bias=False)
        self.model = nn.Sequential(first, nn.BatchNorm2d(_JOINT), nn.ReLU(), nn.Conv2d(_JOINT, _JOINT, 1))


class ImageModel(nn.Module):
    """BioViL's image model with random weights.

    Args:
        temporal: whether it is BioViL-T's.
    """

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.encoder = _Encoder(temporal)
        self.projector = _Projector(2 * _FUSED if temporal else _WIDTH)


class BioVilTower(Tower):
    """The image model. Its features are the projected patches ("after_norm"), or those before the projector.

    Args:
        model: the image model, of BioViL or BioViL-T.
        features: "after_norm" or "before_norm".
    """

    has_attention: ClassVar[bool] = False

    def __init__(self, model: ImageModel, features: str = "after_norm") -> None:
        width = _JOINT if features == "after_norm" else model.projector.width
        super().__init__(PatchGrid(SIZE // STRIDE, SIZE // STRIDE), width, SIZE, features)
        self.model = model

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        return SIZE

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> BioVilTower:
        return cls(ImageModel(_is_temporal(read_weights(source.weights))), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> BioVilTower:
        state = read_weights(source.weights)
        model = ImageModel(_is_temporal(state))
        own = {key: value for key, value in state.items() if not key.startswith(_OTHERS)}
        load_exactly(model, own, source.weights, prefix="", others=())
        return cls(model, features)

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        encoder, resnet = self.model.encoder, self.model.encoder.encoder
        map_Ibhw = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(pixels))))
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            map_Ibhw = stage(map_Ibhw)
        if encoder.backbone_to_vit is not None and encoder.missing_previous_emb is not None:
            now_Ibhw = encoder.backbone_to_vit(map_Ibhw)
            map_Ibhw = torch.cat([now_Ibhw, encoder.missing_previous_emb.expand_as(now_Ibhw)], dim=1)
        patches = map_Ibhw.flatten(2).transpose(1, 2)
        return Streams(patches, patches)

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        map_Ibhw = patches.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))
        projected: torch.Tensor = self.model.projector.model(map_Ibhw)
        return projected.flatten(2).transpose(1, 2)

    @override
    def attention(self, streams: Streams) -> None:
        return None


def _is_temporal(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the weights are those of BioViL-T."""
    return any(key.startswith(_TEMPORAL) for key in state)
