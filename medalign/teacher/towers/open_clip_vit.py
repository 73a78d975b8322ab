"""open_clip's own vision transformer with a class token; UniMed-CLIP, CheXzero and OpenAI's CLIP are such towers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn
from typing_extensions import override

from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.teacher.source import SCHEME, TeacherSource
from medalign.teacher.towers.base import ClassTokenTower, Streams, TextAlignedTower
from medalign.teacher.towers.conv_stem import ConvStem
from medalign.teacher.towers.open_clip_text import UNIMED, embed_texts
from medalign.teacher.weights import load_exactly, read_weights

_STUB_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_KNOWN = [field.name for field in fields(open_clip.CLIPVisionCfg)]


def build_clip(model_config: Mapping[str, Any]) -> open_clip.CLIP:
    """Build open_clip's CLIP, with random weights, from a `model_cfg`, which may also set `conv_stem` channels."""
    settings = dict(model_config)
    channels = settings.pop("conv_stem", None)
    model = open_clip.CLIP(**settings)
    if channels:
        vision = settings["vision_cfg"]
        model.visual.conv1 = ConvStem(channels, vision["width"], vision["patch_size"])
    return model


def build_visual(source: TeacherSource) -> Any:
    """Build the vision tower of a CLIP with random weights. Raises ConfigError if open_clip cannot build it."""
    # The text tower is replaced by a stub: it is not needed, and some text towers require a download.
    wanted = ("embed_dim", "vision_cfg", "quick_gelu", "conv_stem")
    config = {key: source.config[key] for key in wanted if key in source.config}
    # The weights come from the teacher's file. Where its training began from timm's, timm would download those.
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    try:
        return build_clip({**config, "text_cfg": _STUB_TEXT}).visual
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"teacher {source.name}: open_clip cannot build model_cfg ({type(error).__name__}: {error})"
        ) from error


class OpenClipTower(ClassTokenTower, TextAlignedTower):
    """open_clip's VisionTransformer, whose class token is trained."""

    def __init__(self, visual: VisionTransformer, features: str = "after_norm") -> None:
        blocks = visual.transformer.resblocks
        if len(blocks) < 2 or not isinstance(blocks[-1], ResidualAttentionBlock) or visual.attn_pool is not None:
            raise ConfigError(
                "the teacher's vision tower must have at least two plain blocks and no attentional pooling; "
                f"this one has {len(blocks)} of type {type(blocks[-1]).__name__}"
            )
        super().__init__(PatchGrid(*visual.grid_size), visual.transformer.width, visual.image_size[0], features)
        self.visual = visual

    @staticmethod
    @override
    def check(source: TeacherSource) -> int:
        vision = source.config["vision_cfg"]
        require_known_keys(source)
        if vision.get("pool_type", "tok") != "tok":
            raise ConfigError(
                f"teacher {source.name}: model_cfg.vision_cfg.pool_type is {vision['pool_type']!r}: its class token, "
                "whose attention is distilled, was not trained; supported: 'tok'"
            )
        return source.require_whole_patches(square_size(source, "image_size"), square_size(source, "patch_size"))

    @classmethod
    @override
    def build(cls, source: TeacherSource, features: str) -> OpenClipTower:
        return cls(build_visual(source), features)

    @classmethod
    @override
    def load(cls, source: TeacherSource, features: str) -> OpenClipTower:
        tower, state = cls.build(source, features), read_weights(source.weights)
        _require_quick_gelu(source, state)
        load_exactly(tower.visual, state, source.weights)
        return tower

    @override
    def encode(self, pixels: torch.Tensor) -> Streams:
        last = len(self.visual.transformer.resblocks) - 1
        output = self.visual.forward_intermediates(
            pixels,
            indices=[last - 1, last],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        before, after = output["image_intermediates"]
        return Streams(torch.cat([output["image_intermediates_prefix"][0], before], dim=1), after)

    @override
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.visual.ln_post(patches)
        return normed

    @property
    @override
    def heads(self) -> int:
        return int(self.visual.transformer.resblocks[-1].attn.num_heads)

    @override
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.transformer.resblocks)

    @override
    def query_and_key(self, block: Any, tokens: torch.Tensor, queries: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        normed = block.ln_1(tokens)
        weight_q, weight_k, _ = block.attn.in_proj_weight.chunk(3)
        bias_q, bias_k, _ = block.attn.in_proj_bias.chunk(3)
        query = nn.functional.linear(normed[:, :queries], weight_q, bias_q)
        return query, nn.functional.linear(normed, weight_k, bias_k)

    @override
    def values(self, streams: Streams) -> torch.Tensor:
        block = self.visual.transformer.resblocks[-1]
        attention = block.attn
        weight_v, bias_v = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        value = nn.functional.linear(block.ln_1(streams.before[:, 1:]), weight_v, bias_v)
        projected: torch.Tensor = self.visual.ln_post(block.ls_1(attention.out_proj(value))) @ self.visual.proj
        return projected

    @classmethod
    @override
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        return embed_texts(source, texts)


def require_known_keys(source: TeacherSource) -> None:
    """Raise ConfigError for a key of model_cfg.vision_cfg that open_clip does not know."""
    for key in source.config["vision_cfg"]:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            hint = f"did you mean {near[0]}?" if near else f"open_clip knows {', '.join(_KNOWN)}"
            raise ConfigError(f"teacher {source.name}: unknown key {key!r} in model_cfg.vision_cfg; {hint}")


def square_size(source: TeacherSource, key: str) -> int:
    """Return a size of the vision tower, in pixels per side. Raises ConfigError if it is not square."""
    size = source.config["vision_cfg"].get(key, getattr(open_clip.CLIPVisionCfg, key))
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise ConfigError(
            f"teacher {source.name}: model_cfg.vision_cfg.{key} is {size!r}; supported: a positive integer (square)"
        )
    side: int = sides[0]
    return side


def _require_quick_gelu(source: TeacherSource, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ConfigError if a UniMed-CLIP tower would run with an activation that it was not trained with.

    Its weights fit both activations, and with the wrong one all features are wrong.
    """
    if source.config.get("quick_gelu") or not any(key.startswith(UNIMED) for key in state):
        return
    remedy = "set model_cfg.quick_gelu to true"
    if source.name.startswith(SCHEME):
        architecture = source.name.removeprefix(SCHEME).partition("/")[0]
        remedy = f"give {SCHEME}{architecture}-quickgelu/{source.weights}"
    raise ConfigError(
        f"teacher {source.name}: {source.weights.name} holds {UNIMED}* and is therefore a UniMed-CLIP, which was "
        f"trained with quick GELU, but this architecture uses exact GELU; {remedy}"
    )
