"""W: a learnable matrix that moves image tokens before the tapped block, `X~ = X + epsilon X W^T`.

B samples, L tokens, T image tokens of all samples, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Steering(nn.Module):
    """Zero at the start, so an untrained W leaves the student as it is.

    The weight is used in this module's own forward pass alone: under ZeRO-3 that is when it is whole.

    Args:
        width: D, hidden width of the student.
        epsilon: strength of the steering.
    """

    def __init__(self, width: int, epsilon: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, hidden_BLD: torch.Tensor, image_mask_BL: torch.Tensor) -> torch.Tensor:
        """Hidden states with the image tokens steered; the others are returned bit for bit.

        A batch without image tokens keeps W in the graph, with gradient zero.
        """
        tokens_TD = hidden_BLD[image_mask_BL]
        moved_TD = F.linear(tokens_TD.to(self.weight.dtype), self.weight).to(tokens_TD.dtype)
        steered_BLD = hidden_BLD.clone()
        steered_BLD[image_mask_BL] = tokens_TD + self.epsilon * moved_TD
        return steered_BLD

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[1]}, epsilon={self.epsilon}"
