"""Towers of teachers as vision towers of transformers, which LLaVA can contain.

Towers of transformers stay as they are. open_clip's own transformer becomes a `CLIPVisionModel`. timm's plain
transformer (BiomedCLIP) becomes a `Dinov2Model`, which is the same computation: a class token, pre-norm blocks with a
scale per channel, exact GELU, and no norm before the first block. The result is compared with the teacher on random
pixels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel, CLIPVisionConfig, Dinov2Config

from medalign.errors import ConfigError
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers import Tower
from medalign.teacher.towers.hf import HFTower
from medalign.teacher.towers.open_clip_vit import OpenClipTower
from medalign.teacher.towers.timm_vit import TimmTower
from medalign.teacher.weights import describe_misfit

_Weights = dict[str, torch.Tensor]
_PARTS = ("q_proj", "k_proj", "v_proj")  # the order of rows in a weight of all three
_OPEN_CLIP = (  # names of open_clip -> of CLIPVisionModel; {} stands for queries, keys and values
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_", ".self_attn.{}."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TIMM = (  # names of timm -> of Dinov2Model
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.qkv\.", ".attention.{}."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
)
# Rounding of float32 in another order, relative to the largest feature: towers of the size of ViT-B/16 differ by 1e-6.
# Exact GELU in the place of quick GELU makes a difference of 1e-2 in small ones.
_TOLERANCE = 1e-4


@torch.no_grad()
def transformers_tower(source: TeacherSource, tower: Tower) -> Any:
    """Return a vision tower of transformers that computes the teacher's features.

    Its hidden state after the last block, without the class token, is what `tower` with "before_norm" gives.

    Args:
        source: where the teacher comes from.
        tower: the teacher's tower in float32, with features "before_norm".

    Raises:
        ConfigError: no class of transformers that LLaVA can contain computes what the tower computes.
    """
    if isinstance(tower, HFTower):
        model = getattr(tower.model, "vision_model", tower.model)  # without the projection into the space of texts
        config = copy.deepcopy(model.config)
        config._name_or_path = ""  # the folder on this machine
        found = _build(source, config, model.state_dict())
    elif isinstance(tower, OpenClipTower):
        found = _build(source, _clip_config(source, tower), _open_clip_weights(tower))
    elif isinstance(tower, TimmTower) and tower.prefix_tokens:
        found = _build(source, _dinov2_config(source, tower), _timm_weights(tower))
    else:
        raise _refusal(source, f"its tower (kind {source.kind!r}) has no class token")
    _require_same_features(source, tower, found)
    return found


def image_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Run a tower of transformers as LLaVA does with `vision_feature_layer` -1: [I, 3, S, S] to [I, M, b]."""
    hidden: torch.Tensor = model(pixels, output_hidden_states=True).hidden_states[-1]
    return hidden[:, class_tokens(model) :]


def class_tokens(model: Any) -> int:
    """Return how many tokens precede the patches."""
    return int(model.config.model_type != "siglip_vision_model")


def _clip_config(source: TeacherSource, tower: OpenClipTower) -> CLIPVisionConfig:
    visual: Any = tower.visual
    block = visual.transformer.resblocks[0]
    return CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.image_size // tower.grid.rows,
        projection_dim=visual.output_dim,
        hidden_act="quick_gelu" if source.config.get("quick_gelu") else "gelu",
        layer_norm_eps=block.ln_1.eps,
    )


def _open_clip_weights(tower: OpenClipTower) -> _Weights:
    state = tower.visual.state_dict()
    state.pop("proj", None)  # into the space of texts
    return _renamed(state, _OPEN_CLIP)


def _dinov2_config(source: TeacherSource, tower: TimmTower) -> Dinov2Config:
    trunk: Any = tower.visual.trunk
    block = trunk.blocks[0]
    ratio, rest = divmod(block.mlp.fc1.out_features, tower.width)
    if rest:
        raise _refusal(source, f"its blocks are {block.mlp.fc1.out_features} wide, not a multiple of {tower.width}")
    return Dinov2Config(
        hidden_size=tower.width,
        mlp_ratio=ratio,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.image_size // tower.grid.rows,
        layer_norm_eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        use_mask_token=False,
    )


def _timm_weights(tower: TimmTower) -> _Weights:
    trunk: Any = tower.visual.trunk
    found = _renamed(trunk.state_dict(), _TIMM)
    for place in range(len(trunk.blocks)):
        for scale in ("layer_scale1", "layer_scale2"):  # models without these compute as with ones
            found.setdefault(f"encoder.layer.{place}.{scale}.lambda1", torch.ones(tower.width))
    return found


def _renamed(state: Mapping[str, torch.Tensor], names: Sequence[tuple[str, str]]) -> _Weights:
    found: _Weights = {}
    for name, value in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if "{}" in name:
            found |= {name.format(part): rows for part, rows in zip(_PARTS, value.chunk(3), strict=True)}
        else:
            found[name] = value
    return found


def _build(source: TeacherSource, config: Any, state: _Weights) -> Any:
    model: Any = AutoModel.from_config(config)
    wanted = model.state_dict()
    shapes = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if misfit := describe_misfit(sorted(missing), sorted(unexpected), sorted(shapes)):
        raise _refusal(source, f"its weights do not fit {type(model).__name__}: {misfit}")
    model.load_state_dict(state)
    return model.eval()


def _require_same_features(source: TeacherSource, tower: Tower, model: Any) -> None:
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    wanted, found = tower.features(tower.encode(pixels)), image_tokens(model, pixels)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= _TOLERANCE:
        raise _refusal(source, f"the features of {type(model).__name__} with its weights differ by {difference:.1e}")


def _refusal(source: TeacherSource, reason: str) -> ConfigError:
    return ConfigError(
        f"teacher {source.name} cannot be the vision tower of LLaVA: {reason}; supported: CLIP, SigLIP and DINOv2 of "
        "transformers, plain transformers of open_clip and timm with one class token"
    )
