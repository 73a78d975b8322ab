"""Small random teachers of every kind, written by the real classes, and their outputs computed another way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.open_clip_vit import build_clip

SIZE, PATCH = 48, 8
GRID, WIDTH, HEADS = SIZE // PATCH, 24, 3
RESNET_GRID, RESNET_WIDTH = 3, 256  # of 96 pixels
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
Outputs = tuple[torch.Tensor, torch.Tensor]  # features [I, M, b], attention [I, M]


@dataclass(frozen=True)
class Case:
    """A kind of tower."""

    name: str
    write: Callable[[Path], Any]  # writes a folder; returns the model that it holds
    eager: Callable[[Any, torch.Tensor], Outputs]
    values: Callable[[Any, torch.Tensor], torch.Tensor] | None = None  # the value path, [I, M, e]
    weights: str = "model.safetensors"
    size: int = SIZE
    grid: int = GRID
    width: int = WIDTH
    has_norm: bool = True  # whether a norm follows the last block
    a_weight: str = ""  # name in the file of one weight of the vision tower, with at least two dimensions


def sharpen(model: nn.Module) -> nn.Module:
    """Draw weights that are far from those of a fresh model, whose attention is almost uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter + 0.3 * noise if parameter.ndim < 2 else noise * 2 * parameter[0].numel() ** -0.5
    return model.eval()


def only_itself(tokens: int) -> torch.Tensor:
    """A mask with which each token attends only to itself, float [K, K]."""
    return torch.zeros(tokens, tokens).masked_fill(~torch.eye(tokens, dtype=torch.bool), -torch.inf)


def input_of(block: nn.Module, model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tokens that enter a block, [I, K, b]."""
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(pixels)
    handle.remove()
    return seen[0]


def write_image_settings(folder: Path) -> None:
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_open_clip(folder: Path, vision: dict, weights: str = WEIGHTS_NAME) -> Any:
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = sharpen(build_clip(config))
    folder.mkdir(parents=True)
    preprocess = {"mean": MEAN, "std": STD}
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if weights.endswith(".bin"):
        torch.save(model.state_dict(), folder / weights)
    else:
        save_file(model.state_dict(), folder / weights)
    return model.visual


def eager_open_clip(visual: VisionTransformer, pixels: torch.Tensor) -> Outputs:
    block = visual.transformer.resblocks[-1]
    normed = block.ln_1(input_of(block, visual, pixels))
    visual.output_tokens = True
    return visual(pixels)[1], block.attn(normed, normed, normed, need_weights=True)[1][:, 0, 1:]


def values_open_clip(visual: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    block = visual.transformer.resblocks[-1]
    normed = block.ln_1(input_of(block, visual, pixels))
    mixed = block.attn(normed, normed, normed, attn_mask=only_itself(normed.shape[1]), need_weights=False)[0]
    return visual.ln_post(mixed[:, 1:]) @ visual.proj


def eager_resnet(visual: Any, pixels: torch.Tensor) -> Outputs:
    patches, attention, _ = _pool_resnet(visual, pixels, None)
    return patches, attention[:, 0, 1:]


def values_resnet(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    return _pool_resnet(visual, pixels, only_itself(RESNET_GRID**2 + 1))[2][:, 1:]


def _pool_resnet(visual: Any, pixels: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Patches, and the attention matrix and outputs of torch's own attention with the weights of the pooling."""
    pool = visual.attnpool
    patches = visual.forward_intermediates(pixels)["image_intermediates"][-1].flatten(2).transpose(1, 2)
    tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) + pool.positional_embedding
    reference = nn.MultiheadAttention(RESNET_WIDTH, pool.num_heads, batch_first=True)
    reference.in_proj_weight.data = torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight])
    reference.in_proj_bias.data = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    reference.out_proj.weight.data, reference.out_proj.bias.data = torch.eye(RESNET_WIDTH), torch.zeros(RESNET_WIDTH)
    mixed, matrix = reference(tokens, tokens, tokens, attn_mask=mask, need_weights=True)
    return patches, matrix, pool.c_proj(mixed)


@register_model
def medalign_tiny_vit(**kwargs: Any) -> TimmTransformer:
    """Register a model this small: timm builds models by name only."""
    return _timm(**kwargs)


@register_model
def medalign_tiny_vit_registers(**kwargs: Any) -> TimmTransformer:
    return _timm(**kwargs, reg_tokens=2, qk_norm=True, init_values=0.5)


@register_model
def medalign_tiny_siglip(**kwargs: Any) -> TimmTransformer:
    return _timm(**{**kwargs, "global_pool": "map"}, class_token=False)


@register_model
def medalign_tiny_averaged(**kwargs: Any) -> TimmTransformer:
    return _timm(**{**kwargs, "global_pool": "avg"})


def _timm(**kwargs: Any) -> TimmTransformer:
    for key in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    model = TimmTransformer(img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, **kwargs)
    model.default_cfg = {}  # open_clip looks for the size of the pooling here
    return model


def timm_case(name: str, model: str, pooling: bool = False, **vision: Any) -> Case:
    settings = {"timm_model_name": model, "timm_pool": "", "timm_proj": "linear", "image_size": SIZE, **vision}
    file, weight = "open_clip_pytorch_model.bin", "visual.trunk.blocks.1.attn.qkv.weight"
    eager, values = (eager_timm_pooling, values_timm_pooling) if pooling else (eager_timm, values_timm)
    return Case(name, lambda folder: write_open_clip(folder, settings, file), eager, values, file, a_weight=weight)


def eager_timm(visual: Any, pixels: torch.Tensor) -> Outputs:
    """Unfused attention of timm passes its matrix to the dropout layer."""
    trunk, seen = visual.trunk, []
    attention = trunk.blocks[-1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    features = trunk.forward_features(pixels)
    handle.remove()
    prefix = trunk.num_prefix_tokens
    return features[:, prefix:], seen[0].mean(1)[:, 0, prefix:]


def values_timm(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    trunk = visual.trunk
    block = trunk.blocks[-1]
    normed = block.norm1(input_of(block, trunk, pixels))
    mixed = block.ls1(block.attn(normed, attn_mask=only_itself(normed.shape[1])))
    return visual.head(trunk.norm(mixed[:, trunk.num_prefix_tokens :]))


def values_timm_pooling(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    features = visual.trunk.forward_features(pixels)
    return torch.stack([visual.head(visual.trunk.attn_pool(patch)) for patch in features.split(1, dim=1)], dim=1)


def eager_timm_pooling(visual: Any, pixels: torch.Tensor) -> Outputs:
    """The pooling query through torch's own multi-head attention."""
    trunk, pool = visual.trunk, visual.trunk.attn_pool
    features = trunk.forward_features(pixels)
    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    reference.in_proj_weight.data = torch.cat([pool.q.weight, pool.kv.weight])
    reference.in_proj_bias.data = torch.cat([pool.q.bias, pool.kv.bias])
    query = pool.latent.expand(len(pixels), -1, -1)
    return features, reference(query, features, features, need_weights=True)[1][:, 0]


def write_transformers(folder: Path, model: Any) -> Any:
    sharpen(model).save_pretrained(folder)
    write_image_settings(folder)
    return model


VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def clip_model() -> CLIPModel:
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": 40}, projection_dim=16))


def siglip_model() -> SiglipModel:
    return SiglipModel(
        SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": WIDTH, "vocab_size": 40})
    )


def eager_clip(model: Any, pixels: torch.Tensor) -> Outputs:
    vision = getattr(model, "vision_model", model)
    model.set_attn_implementation("eager")
    output = vision(pixels, output_attentions=True)
    return vision.post_layernorm(output.last_hidden_state[:, 1:]), output.attentions[-1].mean(1)[:, 0, 1:]


def values_clip(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("eager")
    last = model.vision_model.encoder.layers[-1]
    normed = last.layer_norm1(input_of(last, model.vision_model, pixels))
    mixed = last.self_attn(normed, attention_mask=only_itself(normed.shape[1]))[0]
    return model.visual_projection(model.vision_model.post_layernorm(mixed[:, 1:]))


def values_siglip(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    vision = getattr(model, "vision_model", model)
    patches = vision(pixels).last_hidden_state
    return torch.stack([vision.head(patch) for patch in patches.split(1, dim=1)], dim=1)


def eager_siglip(model: Any, pixels: torch.Tensor) -> Outputs:
    vision = getattr(model, "vision_model", model)
    patches = vision(pixels).last_hidden_state
    probe = vision.head.probe.expand(len(pixels), -1, -1)
    return patches, vision.head.attention(probe, patches, patches, need_weights=True)[1][:, 0]


def eager_dinov2(model: Any, pixels: torch.Tensor) -> Outputs:
    model.set_attn_implementation("eager")
    output = model(pixels, output_attentions=True)
    return output.last_hidden_state[:, 1:], output.attentions[-1].mean(1)[:, 0, 1:]


CASES = [
    Case(
        "open_clip",
        lambda folder: write_open_clip(
            folder, {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "head_width": 8, "layers": 3}
        ),
        eager_open_clip,
        values_open_clip,
        WEIGHTS_NAME,
        a_weight="visual.transformer.resblocks.1.attn.in_proj_weight",
    ),
    Case(
        "open_clip ResNet (PubMedCLIP RN50)",
        lambda folder: write_open_clip(
            folder, {"image_size": 32 * RESNET_GRID, "layers": [1, 1, 2, 1], "width": RESNET_WIDTH // 32}
        ),
        eager_resnet,
        values_resnet,
        WEIGHTS_NAME,
        32 * RESNET_GRID,
        RESNET_GRID,
        RESNET_WIDTH,
        has_norm=False,
        a_weight="visual.layer3.1.conv1.weight",
    ),
    timm_case("timm (BiomedCLIP)", "medalign_tiny_vit"),
    timm_case("timm with registers, norms of queries and keys, layer scale", "medalign_tiny_vit_registers"),
    timm_case("timm (SigLIP)", "medalign_tiny_siglip", pooling=True, timm_pool="map", timm_proj="none"),
    Case(
        "transformers CLIP",
        lambda folder: write_transformers(folder, clip_model()),
        eager_clip,
        values_clip,
        a_weight="vision_model.encoder.layers.1.self_attn.q_proj.weight",
    ),
    Case(
        "transformers CLIP vision model",
        lambda folder: write_transformers(folder, CLIPVisionModel(CLIPVisionConfig(**VISION))),
        eager_clip,
        a_weight="encoder.layers.1.self_attn.q_proj.weight",
    ),
    Case(
        "transformers SigLIP (MedSigLIP)",
        lambda folder: write_transformers(folder, siglip_model()),
        eager_siglip,
        values_siglip,
        a_weight="vision_model.head.attention.in_proj_weight",
    ),
    Case(
        "transformers SigLIP vision model",
        lambda folder: write_transformers(folder, SiglipVisionModel(SiglipVisionConfig(**VISION))),
        eager_siglip,
        values_siglip,
        a_weight="head.attention.in_proj_weight",
    ),
    Case(
        "transformers DINOv2 (RAD-DINO)",
        lambda folder: write_transformers(
            folder, Dinov2Model(Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}))
        ),
        eager_dinov2,
        a_weight="encoder.layer.1.attention.attention.query.weight",
    ),
]
