"""CLIP's vision tower in transformers: PubMedCLIP, StreetCLIP and other folders with `model_type` clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from typing_extensions import override

from medalign.teacher.source import TeacherSource
from medalign.teacher.towers import hf
from medalign.teacher.towers.base import ClassTokenTower, Streams, TextAlignedTower

_OTHERS = ("text_model.", "text_projection.", "logit_scale", "visual_projection.")
_NOT_TEXT = ("vision_model.", "visual_projection.", "logit_scale")


class HFClipTower(hf.HFTower, ClassTokenTower, TextAlignedTower):
    """A pre-norm transformer with a class token.

    Args:
        model: CLIP's vision tower, with or without the projection into the space of texts.
        features: "after_norm" or "before_norm".
    """

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        return hf.check_sizes(source, CLIPVisionConfig)

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> HFClipTower:
        return cls(hf.build_model(source, _class(source), _config(source)), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> HFClipTower:
        return cls(hf.load_model(source, _class(source), _config(source), _OTHERS), features)

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        tokens = self._trunk.pre_layrnorm(self._trunk.embeddings(pixels))
        *blocks, last = self._trunk.encoder.layers
        for block in blocks:
            tokens = block(tokens, None)
        return Streams(tokens, last(tokens, None)[:, 1:])

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self._trunk.post_layernorm(patches)
        return normed

    @property
    @override
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @override
    def blocks(self) -> Sequence[nn.Module]:
        return list(self._trunk.encoder.layers)

    @override
    def query_and_key(self, block: Any, tokens: torch.Tensor, queries: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        normed = block.layer_norm1(tokens)
        return block.self_attn.q_proj(normed[:, :queries]), block.self_attn.k_proj(normed)

    @override
    def values(self, streams: Streams) -> torch.Tensor:
        last = self._trunk.encoder.layers[-1]
        value = last.self_attn.v_proj(last.layer_norm1(streams.before[:, 1:]))
        projected: torch.Tensor = self.model.visual_projection(self.final_norm(last.self_attn.out_proj(value)))
        return projected

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        hf.require_text_tower(source, "clip")
        config = hf.read_config(source, CLIPTextConfig)
        config.projection_dim = source.config.get("projection_dim", config.projection_dim)
        model = hf.load_model(source, CLIPTextModelWithProjection, config, _NOT_TEXT)
        tokens = hf.tokenize(source, texts, padding=True, length=config.max_position_embeddings)
        features: torch.Tensor = model(**tokens).text_embeds
        return features

    @property
    def _trunk(self) -> Any:
        return getattr(self.model, "vision_model", self.model)


def _class(source: TeacherSource) -> type[CLIPVisionModel | CLIPVisionModelWithProjection]:
    """A complete CLIP has the projection into the space of texts, a vision model does not."""
    return CLIPVisionModelWithProjection if source.kind == "clip" else CLIPVisionModel


def _config(source: TeacherSource) -> Any:
    """The projection's width is a setting of the complete model, not of its vision tower."""
    config = hf.read_config(source, CLIPVisionConfig)
    config.projection_dim = source.config.get("projection_dim", config.projection_dim)
    return config
