"""The teacher: the frozen vision tower of any open_clip model.

Shape suffixes: I images, T pixels a side, M patches, b the tower's width, H heads, h width of a head.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medalign.config.schema import TeacherFeatures
from medalign.errors import CheckpointError, ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.teacher.source import TeacherSource, find

FEATURES = get_args(TeacherFeatures)
_STUB_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class ConvStem(nn.Module):
    """Patch embedding by small convolutions, in place of `VisionTransformer.conv1`.

    Each entry of `channels` is one 3 x 3 convolution of stride 2; a last convolution, without overlap, projects to
    the tower's width and brings the total stride to the patch size. Few steps suffice to train it, where a plain
    patch embedding needs many.
    """

    def __init__(self, channels: Sequence[int], width: int, patch_size: int):
        super().__init__()
        stride, rest = divmod(patch_size, 2 ** len(channels))
        if rest or not stride:
            raise ConfigError(f"conv_stem has {len(channels)} halvings, which do not divide patch_size {patch_size}")
        layers: list[nn.Module] = []
        before = 3
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, after), nn.GELU()]
            before = after
        layers.append(nn.Conv2d(before, width, stride, stride=stride))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[I, 3, T, T] to [I, b, T / patch, T / patch]."""
        return self.layers(pixels)


def build_clip(model_config: Mapping[str, Any]) -> open_clip.CLIP:
    """open_clip's CLIP from a `model_cfg`, which may name `conv_stem` channels; weights are untrained."""
    settings = dict(model_config)
    channels = settings.pop("conv_stem", None)
    model = open_clip.CLIP(**settings)
    if channels:
        vision = settings["vision_cfg"]
        model.visual.conv1 = ConvStem(channels, vision["width"], vision["patch_size"])
    return model


class Tower(nn.Module):
    """What the teacher asks of a vision tower. Each kind of tower that is supported has one adapter."""

    grid: PatchGrid
    width: int
    image_size: tuple[int, int]

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[I, 3, T, T] to the last layer's patch features [I, M, b] and class-token attention [I, M]."""
        raise NotImplementedError


class TransformerTower(Tower):
    """open_clip's own VisionTransformer.

    Features are taken after the final norm (`ln_post`) by default: the bare residual stream may have a few channels far
    larger than the others, which would make every cosine between patches close to one. "before_norm" takes the stream,
    as the released code does.
    """

    def __init__(self, visual: VisionTransformer, features: str = "after_norm"):
        super().__init__()
        blocks = visual.transformer.resblocks
        if len(blocks) < 2 or not isinstance(blocks[-1], ResidualAttentionBlock) or visual.attn_pool is not None:
            raise ConfigError(
                "the teacher's vision tower must have at least two plain blocks and no attentional pooling; "
                f"this one has {len(blocks)} of type {type(blocks[-1]).__name__}"
            )
        if features not in FEATURES:
            raise ValueError(f'TransformerTower: features="{features}" is none of {", ".join(FEATURES)}')
        self.visual = visual
        self.features = features
        self.grid = PatchGrid(*visual.grid_size)
        self.width = visual.transformer.width
        self.image_size = visual.image_size

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = len(self.visual.transformer.resblocks) - 1
        output = self.visual.forward_intermediates(
            pixels,
            indices=[last - 1, last],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        before, after = output["image_intermediates"]
        tokens = torch.cat([output["image_intermediates_prefix"][0], before], dim=1)
        features = self.visual.ln_post(after) if self.features == "after_norm" else after
        return features, class_attention(self.visual.transformer.resblocks[last], tokens)


def class_attention(block: ResidualAttentionBlock, tokens: torch.Tensor) -> torch.Tensor:
    """What the class token, the first one, attends to in `block`, given the block's input [I, 1 + M, b].

    One row of the softmax, over all 1 + M keys, mean over heads, in float32; the weight it gives itself is left
    out, so a row [M] sums to less than 1. The other rows are never computed.
    """
    attention = block.attn
    normed = block.ln_1(tokens)
    weight_q, weight_k, _ = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, _ = attention.in_proj_bias.chunk(3)
    query_IHh = nn.functional.linear(normed[:, 0], weight_q, bias_q).unflatten(-1, (attention.num_heads, -1))
    key_IKHh = nn.functional.linear(normed, weight_k, bias_k).unflatten(-1, (attention.num_heads, -1))
    scores_IHK = torch.einsum("ihc,ikhc->ihk", query_IHh.float(), key_IKHh.float()) * attention.head_dim**-0.5
    return scores_IHK.softmax(dim=-1).mean(dim=1)[:, 1:]


class Teacher(nn.Module):
    """A frozen tower and what one must know to show it an image."""

    def __init__(self, tower: Tower, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.tower = tower
        self.preprocess_cfg = PreprocessCfg(tower.image_size[0], (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        self.requires_grad_(False)
        super().train(False)

    @property
    def grid(self) -> PatchGrid:
        return self.tower.grid

    @property
    def width(self) -> int:
        return self.tower.width

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever the loop around it does."""
        return self

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[I, 3, T, T] to patch features [I, M, b] of the last layer and class-token attention [I, M] (float32)."""
        return self.tower.look(pixels.to(next(self.parameters()).dtype))


def load_teacher(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    random_weights_seed: int | None = None,
    features: str = "after_norm",
) -> Teacher:
    """A frozen teacher from a local folder in the layout of open_clip's hub models, or from `open_clip:ARCH/WEIGHTS`.

    WEIGHTS is a file (safetensors, or a torch file without pickled code), no tag: nothing is fetched. With
    `random_weights_seed` the weights are not read: the control of an untrained teacher, always the same one for a seed.
    `features` says whether patch features are taken "after_norm" or "before_norm" (the tower's final norm).
    Raises ConfigError where the tower is of a kind that is not supported.
    """
    source = find(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_weights_seed or 0)
        visual = _untrained(source)
    if random_weights_seed is None:
        _load_vision_weights(visual, source.weights)
    return Teacher(TransformerTower(visual, features), source.mean, source.std).to(device=device, dtype=dtype)


def _untrained(source: TeacherSource) -> VisionTransformer:
    """The tower as open_clip builds it, before its weights are read. Raises ConfigError where it cannot."""
    # The text tower is replaced by a stub: it is not needed, and may want a download of its own.
    wanted = ("embed_dim", "vision_cfg", "quick_gelu", "conv_stem")
    config = {key: source.model_config[key] for key in wanted if key in source.model_config}
    try:
        return build_clip({**config, "text_cfg": _STUB_TEXT}).visual
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"teacher {source.name}: open_clip cannot build model_cfg ({type(error).__name__}: {error})"
        ) from error


def _load_vision_weights(visual: nn.Module, file: Path) -> None:
    """Fill the tower from the `visual.` part of a CLIP checkpoint. Nothing is ever unpickled into code."""
    try:
        state: dict[str, Any] = (
            load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        )
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"teacher weights {file} cannot be read: {error}") from error
    state = state.get("state_dict", state)
    named = {key.removeprefix("module."): value for key, value in state.items()}
    prefix = "visual."
    try:
        visual.load_state_dict({key[len(prefix) :]: named[key] for key in named if key.startswith(prefix)})
    except RuntimeError as error:
        raise CheckpointError(f"teacher weights {file} do not fit the tower: {error}") from error
