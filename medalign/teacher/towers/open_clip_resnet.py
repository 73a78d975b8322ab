"""OpenAI's ResNet in open_clip, with attention pooling: the RN50 variants of CLIP and PubMedCLIP, and PMC-CLIP's.

Each cell of the last feature map is a patch. The pooling attends from the mean patch to all of them; this attention is
the target, as that of a class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from medalign.geometry import PatchGrid
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.base import Streams, TextAlignedTower, query_attention
from medalign.teacher.towers.open_clip_text import embed_texts
from medalign.teacher.towers.open_clip_vit import build_visual, require_known_keys, square_size
from medalign.teacher.weights import load_exactly, read_weights

STRIDE = 32  # pixels per cell of the last feature map


class OpenClipResNetTower(TextAlignedTower):
    """A convolutional tower. It has no norm after the last stage: both kinds of features are its feature map.

    Args:
        visual: open_clip's ModifiedResNet.
        features: "after_norm" or "before_norm".
    """

    def __init__(self, visual: Any, features: str = "after_norm") -> None:
        side = visual.image_size // STRIDE
        super().__init__(PatchGrid(side, side), visual.attnpool.k_proj.in_features, visual.image_size, features)
        self.visual = visual

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        require_known_keys(source)
        return source.require_whole_patches(square_size(source, "image_size"), STRIDE)

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> OpenClipResNetTower:
        return cls(build_visual(source), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> OpenClipResNetTower:
        tower = cls.build(source, features)
        load_exactly(tower.visual, read_weights(source.weights), source.weights)
        return tower

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        stages = (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4)
        map_Ibhw = self.visual.stem(pixels)
        for stage in stages:
            map_Ibhw = stage(map_Ibhw)
        patches = map_Ibhw.flatten(2).transpose(1, 2)
        return Streams(patches, patches)

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        return patches

    @override
    def attention(self, streams: Streams) -> torch.Tensor:
        pool, tokens = self.visual.attnpool, self._pooled_tokens(streams)
        return query_attention(pool.q_proj(tokens[:, 0]), pool.k_proj(tokens), pool.num_heads)[:, 1:]

    @override
    def values(self, streams: Streams) -> torch.Tensor:
        pool = self.visual.attnpool
        projected: torch.Tensor = pool.c_proj(pool.v_proj(self._pooled_tokens(streams)[:, 1:]))
        return projected

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        return embed_texts(source, texts)

    def _pooled_tokens(self, streams: Streams) -> torch.Tensor:
        """What the pooling attends to: the mean patch and the patches, with their positions, [I, 1 + M, b]."""
        tokens = torch.cat([streams.after.mean(1, keepdim=True), streams.after], dim=1)
        positions: torch.Tensor = self.visual.attnpool.positional_embedding
        return tokens + positions.to(tokens.dtype)
