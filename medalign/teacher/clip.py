"""The teacher: the frozen vision tower of any open_clip model.

Shape suffixes: I images, T pixels per side, M patches, K keys (M patches and the class token), b the tower's width,
H heads, h head dimension.
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
from medalign.teacher.source import TeacherSource, find_teacher

FEATURES = get_args(TeacherFeatures)
_STUB_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class ConvStem(nn.Module):
    """Patch embedding made of small convolutions, which replaces `VisionTransformer.conv1`.

    Each entry of `channels` adds a 3 x 3 convolution with stride 2. A final convolution without overlap projects to
    the tower's width and brings the total stride to the patch size. It trains in far fewer steps than a single linear
    patch embedding.

    Args:
        channels: output channels of each 3 x 3 convolution.
        width: b, width of the tower.
        patch_size: pixels per side.

    Raises:
        ConfigError: the strides do not divide the patch size.
    """

    def __init__(self, channels: Sequence[int], width: int, patch_size: int):
        super().__init__()
        stride, rest = divmod(patch_size, 2 ** len(channels))
        if rest or not stride:
            raise ConfigError(
                f"conv_stem has {len(channels)} convolutions, whose total stride {2 ** len(channels)} does not divide "
                f"patch_size {patch_size}; change the number of channels"
            )
        layers: list[nn.Module] = []
        before = 3
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, after), nn.GELU()]
            before = after
        layers.append(nn.Conv2d(before, width, stride, stride=stride))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels [I, 3, T, T] as patches [I, b, T / patch_size, T / patch_size]."""
        return self.layers(pixels)


def build_clip(model_config: Mapping[str, Any]) -> open_clip.CLIP:
    """Build open_clip's CLIP, with random weights, from a `model_cfg`, which may also set `conv_stem` channels."""
    settings = dict(model_config)
    channels = settings.pop("conv_stem", None)
    model = open_clip.CLIP(**settings)
    if channels:
        vision = settings["vision_cfg"]
        model.visual.conv1 = ConvStem(channels, vision["width"], vision["patch_size"])
    return model


class Tower(nn.Module):
    """Interface of a vision tower. Each supported kind of tower has one adapter.

    Attributes:
        grid: the tower's patches.
        width: b, number of features per patch.
        image_size: height and width of its input, in pixels.
    """

    grid: PatchGrid
    width: int
    image_size: tuple[int, int]

    def features_and_attention(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute patch features and class-token attention of the last layer.

        Args:
            pixels: normalized, [I, 3, T, T].

        Returns:
            Features [I, M, b] and attention [I, M].
        """
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

    def features_and_attention(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    """Compute the attention of the class token to the patches in one block.

    This is one row of the softmax over all 1 + M keys, in float32. The other rows are not computed.

    Args:
        block: the transformer block.
        tokens: input of the block, [I, 1 + M, b], with the class token first.

    Returns:
        Attention [I, M], the mean over the heads. The attention of the class token to itself is omitted, so a row
        sums to less than 1.
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
    """A frozen vision tower and its preprocessing.

    Args:
        tower: the vision tower.
        mean: per-channel mean for the normalization of pixels in [0, 1].
        std: per-channel standard deviation.
    """

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
        """Do nothing: the teacher stays in eval mode."""
        return self

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute patch features of the last layer and class-token attention.

        Args:
            pixels: normalized, [I, 3, T, T].

        Returns:
            Features [I, M, b], and attention [I, M] in float32.
        """
        return self.tower.features_and_attention(pixels.to(next(self.parameters()).dtype))


def load_teacher(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    random_weights_seed: int | None = None,
    features: str = "after_norm",
) -> Teacher:
    """Load a frozen teacher. Under ZeRO-3, call it before the student is built, on every rank.

    Args:
        path: a local folder with the layout of open_clip's hub models, or `open_clip:ARCH/WEIGHTS`, where WEIGHTS is
            a file (safetensors, or a torch file without pickled code). Tags are not supported, because nothing is
            downloaded.
        device: where the teacher runs.
        dtype: data type of its weights.
        random_weights_seed: use random weights drawn from this seed instead of reading them. An untrained teacher
            serves as a control.
        features: take patch features "after_norm" or "before_norm", that is after or before the tower's final norm.

    Raises:
        ConfigError: the source is not valid, or the kind of tower is not supported.
        CheckpointError: the weights cannot be read or do not fit the tower.
    """
    source = find_teacher(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_weights_seed or 0)
        visual = _build_tower(source)
    if random_weights_seed is None:
        _load_vision_weights(visual, source.weights)
    return Teacher(TransformerTower(visual, features), source.mean, source.std).to(device=device, dtype=dtype)


def _build_tower(source: TeacherSource) -> VisionTransformer:
    """Build the tower with random weights. Raises ConfigError if open_clip cannot build it."""
    # The text tower is replaced by a stub: it is not needed, and some text towers require a download.
    wanted = ("embed_dim", "vision_cfg", "quick_gelu", "conv_stem")
    config = {key: source.model_config[key] for key in wanted if key in source.model_config}
    try:
        return build_clip({**config, "text_cfg": _STUB_TEXT}).visual
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"teacher {source.name}: open_clip cannot build model_cfg ({type(error).__name__}: {error})"
        ) from error


def _load_vision_weights(visual: nn.Module, file: Path) -> None:
    """Load the `visual.` part of a CLIP checkpoint into the tower. Pickled code is never executed."""
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
