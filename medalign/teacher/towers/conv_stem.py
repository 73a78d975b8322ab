"""A patch embedding made of small convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medalign.errors import ConfigError


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
        patches: torch.Tensor = self.layers(pixels)
        return patches
