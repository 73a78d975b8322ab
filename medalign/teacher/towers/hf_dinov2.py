"""DINOv2 in transformers: RAD-DINO and other folders with `model_type` dinov2. It has no text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from typing_extensions import override

from medalign.teacher.source import TeacherSource
from medalign.teacher.towers import hf
from medalign.teacher.towers.base import ClassTokenTower, Streams

_OTHERS = ("classifier.",)  # of a model for image classification


class HFDinov2Tower(hf.HFTower, ClassTokenTower):
    """A pre-norm transformer with a class token, trained without texts.

    Args:
        model: DINOv2.
        features: "after_norm" or "before_norm".
    """

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        return hf.check_sizes(source, Dinov2Config)

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> HFDinov2Tower:
        return cls(hf.build_model(source, Dinov2Model, hf.read_config(source, Dinov2Config)), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> HFDinov2Tower:
        return cls(hf.load_model(source, Dinov2Model, hf.read_config(source, Dinov2Config), _OTHERS), features)

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        tokens = self.model.embeddings(pixels)
        *blocks, last = self.model.encoder.layer
        for block in blocks:
            tokens = block(tokens)
        return Streams(tokens, last(tokens)[:, 1:])

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.layernorm(patches)
        return normed

    @property
    @override
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @override
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layer)

    @override
    def query_and_key(self, block: Any, tokens: torch.Tensor, queries: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        normed = block.norm1(tokens)
        return block.attention.q_proj(normed[:, :queries]), block.attention.k_proj(normed)
