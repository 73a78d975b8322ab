"""Spatial alignment as a loss term (the paper's L_vis). I images, N image tokens, D and E channels."""

from __future__ import annotations

from typing import get_args

import torch

from medalign.config.schema import PairWeighting
from medalign.contracts import LossTerm
from medalign.kernels import token_similarity

WEIGHTINGS = get_args(PairWeighting)


def similarity_term(
    tokens_IND: torch.Tensor,
    features_INE: torch.Tensor,
    weight_I: torch.Tensor,
    mask_IN: torch.Tensor | None = None,
    pair_weight_IN: torch.Tensor | None = None,
    impl: str = "auto",
) -> LossTerm:
    """The loss summed over images, each with its weight (0 for an image that is not real)."""
    loss_I = token_similarity(tokens_IND, features_INE, mask_IN, pair_weight_IN, impl=impl)
    return LossTerm(sum=(loss_I * weight_I).sum(), count=weight_I.sum())


def attention_weights(attention_IN: torch.Tensor, mask_IN: torch.Tensor | None = None) -> torch.Tensor:
    """The teacher's attention scaled to mean 1 over the valid tokens of each image, float32."""
    attention_IN = attention_IN.detach().float()
    valid_IN = torch.ones_like(attention_IN, dtype=torch.bool) if mask_IN is None else mask_IN
    attention_IN = attention_IN.masked_fill(~valid_IN, 0)
    mean_I1 = attention_IN.sum(1, keepdim=True) / valid_IN.sum(1, keepdim=True).clamp_min(1)
    return attention_IN / mean_I1.clamp_min(torch.finfo(torch.float32).tiny)
