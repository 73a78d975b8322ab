"""timm's vision transformer inside open_clip's CLIP: BiomedCLIP (class token), SigLIP models of open_clip (pooling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from typing_extensions import override

from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.base import ClassTokenTower, Streams, TextAlignedTower, query_attention
from medalign.teacher.towers.open_clip_text import embed_texts
from medalign.teacher.towers.open_clip_vit import build_visual, require_known_keys, square_size
from medalign.teacher.weights import load_exactly, read_weights


class TimmTower(ClassTokenTower, TextAlignedTower):
    """A pre-norm transformer of timm, pooled by its class token or by one learned query.

    Args:
        visual: open_clip's wrapper of the transformer and of the projection into the space of texts.
        features: "after_norm" or "before_norm".
    """

    def __init__(self, visual: TimmModel, features: str = "after_norm") -> None:
        trunk: Any = visual.trunk
        super().__init__(PatchGrid(*trunk.patch_embed.grid_size), trunk.embed_dim, visual.image_size[0], features)
        self.visual = visual

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        require_known_keys(source)
        image = square_size(source, "image_size")
        with torch.device("meta"):
            trunk: Any = build_visual(source).trunk
        _require_supported(source, trunk)
        if tuple(trunk.patch_embed.img_size) != (image, image):
            raise ConfigError(
                f"teacher {source.name}: model_cfg.vision_cfg.image_size is {image}, but "
                f"{source.config['vision_cfg']['timm_model_name']} takes {trunk.patch_embed.img_size[0]} pixels"
            )
        return source.require_whole_patches(image, trunk.patch_embed.patch_size[0])

    @classmethod
    @override
    def has_class_token(cls, source: TeacherSource) -> bool:
        with torch.device("meta"):
            trunk: Any = build_visual(source).trunk
        return bool(trunk.num_prefix_tokens)

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> TimmTower:
        return cls(build_visual(source), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> TimmTower:
        tower = cls.build(source, features)
        load_exactly(tower.visual, read_weights(source.weights), source.weights)
        return tower

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        last = len(self._trunk.blocks) - 1
        before, after = self._trunk.forward_intermediates(
            pixels,
            indices=[last - 1, last],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if not self._trunk.num_prefix_tokens:
            return Streams(before, after)
        return Streams(torch.cat([before[1], before[0]], dim=1), after[0])

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self._trunk.norm(patches)
        return normed

    @override
    def attention(self, streams: Streams) -> torch.Tensor:
        if self._trunk.attn_pool is not None:
            return _pooling_attention(self._trunk.attn_pool, self.final_norm(streams.after))
        return super().attention(streams)

    @property
    @override
    def prefix_tokens(self) -> int:
        return int(self._trunk.num_prefix_tokens)

    @property
    @override
    def heads(self) -> int:
        return int(self._trunk.blocks[-1].attn.num_heads)

    @override
    def blocks(self) -> Sequence[nn.Module]:
        return list(self._trunk.blocks)

    @override
    def query_and_key(self, block: Any, tokens: torch.Tensor, queries: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
        query = _per_head(block.attn.q_norm, query[:, :queries], block.attn)
        return query, _per_head(block.attn.k_norm, key, block.attn)

    @override
    def values(self, streams: Streams) -> torch.Tensor:
        if self._trunk.attn_pool is not None:
            pooled = _pooled_alone(self._trunk.attn_pool, self.final_norm(streams.after))
            features: torch.Tensor = self.visual.head(pooled)
            return features
        last = self._trunk.blocks[-1]
        attention, normed = last.attn, last.norm1(streams.before[:, self._trunk.num_prefix_tokens :])
        value = attention.qkv(normed).chunk(3, dim=-1)[2]
        projected: torch.Tensor = self.visual.head(self.final_norm(last.ls1(attention.proj(attention.norm(value)))))
        return projected

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        return embed_texts(source, texts)

    @property
    def _trunk(self) -> Any:
        return self.visual.trunk


def _pooling_attention(pool: AttentionPoolLatent, patches: torch.Tensor) -> torch.Tensor:
    """Compute the attention of the pooling query to patches [I, M, b]."""
    query = _per_head(pool.q_norm, pool.q(pool.latent)[:, 0], pool).expand(len(patches), -1)
    key = _per_head(pool.k_norm, pool.kv(patches).chunk(2, dim=-1)[0], pool)
    return query_attention(query, key, pool.num_heads)


def _pooled_alone(pool: AttentionPoolLatent, patches: torch.Tensor) -> torch.Tensor:
    """Pool each of the patches [I, M, b] as if it were the only one."""
    pooled = pool.proj(pool.kv(patches).chunk(2, dim=-1)[1])
    features: torch.Tensor = pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))
    return features


def _per_head(norm: Any, values: torch.Tensor, attention: Any) -> torch.Tensor:
    """Apply the norm of queries or keys to each head of [..., H h]; most models have none."""
    normed: torch.Tensor = norm(values.unflatten(-1, (attention.num_heads, -1))).flatten(-2)
    return normed


def _require_supported(source: TeacherSource, trunk: Any) -> None:
    """Raise ConfigError unless the trunk is a plain transformer whose pooling has been trained."""
    name, found = source.config["vision_cfg"]["timm_model_name"], ""
    if type(trunk) is not VisionTransformer:
        found = f"a {type(trunk).__name__}"
    elif type(trunk.blocks[-1]) is not Block or type(trunk.blocks[-1].attn) is not Attention or len(trunk.blocks) < 2:
        found = f"{len(trunk.blocks)} blocks of type {type(trunk.blocks[-1]).__name__}"
    elif trunk.attn_pool is not None:
        pool = trunk.attn_pool
        if type(pool) is not AttentionPoolLatent or pool.latent_len != 1 or pool.pos_embed is not None:
            found = f"a pooling of type {type(pool).__name__}"
    elif trunk.global_pool != "token":
        found = f"global_pool {trunk.global_pool!r}, without a class token or a pooling query that was trained"
    if found:
        raise ConfigError(
            f"teacher {source.name}: {name} has {found}; supported of timm: VisionTransformer with at least two plain "
            "blocks, pooled by its class token or by one query"
        )
