"""W: a learnable matrix that shifts image tokens at the input of a tapped block, `X~ = X + epsilon X W^T`.

W is a full matrix, or the product of two factors, `W = up down`. One that is not zero cannot be folded into the weights
of the model: each block treats equal hidden states equally, be they of image or of text, and W does not.

Shape suffixes: B samples, L tokens, T image tokens of all samples, D hidden size, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Steering(nn.Module):
    """Adds a learned linear map of the image tokens to them.

    W is initialized to zero, so an untrained W does not change the student. The weights are used only in this module's
    forward pass, because that is when ZeRO-3 gathers them.

    Args:
        width: D, hidden size of the student.
        epsilon: strength of the steering.
        rank: R; None for a full matrix.
    """

    def __init__(self, width: int, epsilon: float = 1.0, rank: int | None = None) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.rank = rank
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(width, width))
        else:  # as LoRA begins: one factor random, the other zero
            self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
            self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, hidden_BLD: torch.Tensor, image_mask_BL: torch.Tensor) -> torch.Tensor:
        """Steer the image tokens; all other hidden states are returned unchanged.

        A batch without image tokens keeps W in the graph, with a gradient of zero.

        Args:
            hidden_BLD: hidden states.
            image_mask_BL: True at image tokens.
        """
        tokens_TD = hidden_BLD[image_mask_BL]
        steered_BLD = hidden_BLD.clone()
        steered_BLD[image_mask_BL] = tokens_TD + self.epsilon * self._shift(tokens_TD).to(tokens_TD.dtype)
        return steered_BLD

    def _shift(self, tokens_TD: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            return F.linear(tokens_TD.to(self.weight.dtype), self.weight)
        return F.linear(F.linear(tokens_TD.to(self.down.dtype), self.down), self.up)

    def extra_repr(self) -> str:
        """Return the settings for the text of the module."""
        width = (self.weight if self.rank is None else self.down).shape[1]
        return f"width={width}, epsilon={self.epsilon}, rank={self.rank}"
