"""W: a learnable matrix that shifts image tokens at the input of the tapped block, `X~ = X + epsilon X W^T`.

Shape suffixes: B samples, L tokens, T image tokens of all samples, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Steering(nn.Module):
    """Adds a learned linear map of the image tokens to them.

    W is initialized to zero, so an untrained W does not change the student. The weight is used only in this module's
    forward pass, because that is when ZeRO-3 gathers it.

    Args:
        width: D, hidden size of the student.
        epsilon: strength of the steering.
    """

    def __init__(self, width: int, epsilon: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, hidden_BLD: torch.Tensor, image_mask_BL: torch.Tensor) -> torch.Tensor:
        """Steer the image tokens; all other hidden states are returned unchanged.

        A batch without image tokens keeps W in the graph, with a gradient of zero.

        Args:
            hidden_BLD: hidden states.
            image_mask_BL: True at image tokens.
        """
        tokens_TD = hidden_BLD[image_mask_BL]
        shift_TD = F.linear(tokens_TD.to(self.weight.dtype), self.weight).to(tokens_TD.dtype)
        steered_BLD = hidden_BLD.clone()
        steered_BLD[image_mask_BL] = tokens_TD + self.epsilon * shift_TD
        return steered_BLD

    def extra_repr(self) -> str:
        """Return the settings for the text of the module."""
        return f"width={self.weight.shape[1]}, epsilon={self.epsilon}"
