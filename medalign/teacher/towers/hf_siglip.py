"""SigLIP's vision tower in transformers: MedSigLIP and other folders with `model_type` siglip.

It has no class token. A pooling head reads the patches with one learned query, the probe; the probe's attention to the
patches takes the place of the class token's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel
from typing_extensions import override

from medalign.errors import ConfigError
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers import hf
from medalign.teacher.towers.base import Streams, TextAlignedTower, query_attention

_OTHERS = ("text_model.", "logit_scale", "logit_bias")
_NOT_TEXT = ("vision_model.", "logit_scale", "logit_bias")


class HFSiglipTower(hf.HFTower, TextAlignedTower):
    """A pre-norm transformer whose patches are pooled by attention.

    Args:
        model: SigLIP's vision tower with its pooling head.
        features: "after_norm" or "before_norm".
    """

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        if not hf.read_config(source, SiglipVisionConfig).vision_use_head:
            raise ConfigError(
                f"teacher {source.name}: vision_use_head is false: without its pooling head the tower has no attention "
                "that could be distilled; give the folder of the complete model"
            )
        return hf.check_sizes(source, SiglipVisionConfig)

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> HFSiglipTower:
        return cls(hf.build_model(source, SiglipVisionModel, hf.read_config(source, SiglipVisionConfig)), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> HFSiglipTower:
        return cls(
            hf.load_model(source, SiglipVisionModel, hf.read_config(source, SiglipVisionConfig), _OTHERS), features
        )

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        tokens = self.model.embeddings(pixels)
        *blocks, last = self.model.encoder.layers
        for block in blocks:
            tokens = block(tokens, None)
        return Streams(tokens, last(tokens, None))

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.post_layernorm(patches)
        return normed

    @override
    def attention(self, streams: Streams) -> torch.Tensor:
        pooling, patches = self.model.head.attention, self.final_norm(streams.after)
        weight_q, weight_k, _ = pooling.in_proj_weight.chunk(3)
        bias_q, bias_k, _ = pooling.in_proj_bias.chunk(3)
        probe = nn.functional.linear(self.model.head.probe[:, 0], weight_q, bias_q).expand(len(patches), -1)
        return query_attention(probe, nn.functional.linear(patches, weight_k, bias_k), pooling.num_heads)

    @override
    def values(self, streams: Streams) -> torch.Tensor:
        head, patches = self.model.head, self.final_norm(streams.after)
        weight_v, bias_v = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
        pooled = head.attention.out_proj(nn.functional.linear(patches, weight_v, bias_v))
        features: torch.Tensor = pooled + head.mlp(head.layernorm(pooled))
        return features

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        hf.require_text_tower(source, "siglip")
        config = hf.read_config(source, SiglipTextConfig)
        model = hf.load_model(source, SiglipTextModel, config, _NOT_TEXT)
        # It was trained on texts padded to the full length, and pools at the last position.
        tokens = hf.tokenize(source, texts, padding="max_length", length=config.max_position_embeddings)
        features: torch.Tensor = model(input_ids=tokens["input_ids"]).pooler_output
        return features
