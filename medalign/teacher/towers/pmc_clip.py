"""PMC-CLIP's vision tower with the backbone of OpenAI's ResNet, from a training checkpoint without a configuration.

The sizes of the tower follow from the shapes of its weights, so none is assumed. The other backbone of its code, a
ResNet without attention pooling, is refused. Its text tower and its fusion module are not loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from typing_extensions import override

from medalign.errors import CheckpointError, ConfigError
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.open_clip_resnet import STRIDE, OpenClipResNetTower
from medalign.teacher.weights import read_weights

_POSITIONS, _PROJECTION = "visual.attnpool.positional_embedding", "visual.attnpool.c_proj.weight"
_FIRST = "visual.layer1.0.conv1.weight"


class PmcClipTower(OpenClipResNetTower):
    """The tower of a file `pmc_clip:FILE`."""

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        return OpenClipResNetTower.check(_configured(source))

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> OpenClipResNetTower:
        return super().build(_configured(source), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> OpenClipResNetTower:
        return super().load(_configured(source), features)

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        raise ConfigError(f"teacher {source.name}: PMC-CLIP's text tower is not read; set teacher.text_weight to 0")


def _configured(source: TeacherSource) -> TeacherSource:
    """Return the source with the configuration that the shapes of its weights give; they are not read."""
    return source if source.config else replace(source, config=_config(source, read_weights(source.weights)))


def _config(source: TeacherSource, state: Mapping[str, torch.Tensor]) -> dict[str, object]:
    if missing := [name for name in (_POSITIONS, _PROJECTION, _FIRST) if name not in state]:
        raise CheckpointError(
            f"teacher weights {source.weights} have no {missing[0]}: they are not those of a PMC-CLIP whose "
            "backbone is ModifiedResNet, which pools by attention; other backbones are not supported"
        )
    side = math.isqrt(len(state[_POSITIONS]) - 1)
    vision = {
        "image_size": side * STRIDE,
        "width": state[_FIRST].shape[0],
        "layers": [
            len({key.split(".")[2] for key in state if key.startswith(f"visual.layer{n}.")}) for n in range(1, 5)
        ],
    }
    return {"embed_dim": state[_PROJECTION].shape[0], "vision_cfg": vision}


def _blocks(state: Mapping[str, torch.Tensor], stage: str) -> int:
    """Count the blocks of a stage, whose weights have names such as `visual.layer1.0.conv1.weight`."""
    return len({name.removeprefix(stage).partition(".")[0] for name in state if name.startswith(stage)})
