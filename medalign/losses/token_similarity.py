"""Spatial alignment as a loss term (the paper's L_vis). I images, N image tokens, D and E channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from medalign.config.schema.losses import PairWeighting
from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets
from medalign.kernels import token_similarity
from medalign.losses.term import LossTerm, check_choice, mean_over_blocks

WEIGHTINGS = get_args(PairWeighting)


class SimilarityTerm(LossTerm):
    """The spatial alignment loss.

    Args:
        coefficient: the paper's alpha.
        name: the name of the term.
        teacher: which teacher's features are the target: 0 is the first (`TeacherTargets.of`).
        weighting: weights of the token pairs: "uniform", or "teacher_attention" (w_i w_j with the teacher's attention
            w, scaled to mean 1).
        ignore_padding: whether to exclude patches that show only canvas padding.
        impl: implementation of the kernel.
        layer_weights: one weight per tapped block, for the mean over them; empty if all are equal.

    Raises:
        ValueError: the coefficient is negative, or `weighting` is unknown.
    """

    def __init__(
        self,
        coefficient: float,
        *,
        name: str = "similarity",
        teacher: int = 0,
        weighting: str = "uniform",
        ignore_padding: bool = False,
        impl: str = "auto",
        layer_weights: Sequence[float] = (),
    ) -> None:
        super().__init__(name, coefficient)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.teacher = teacher
        self.weighting = weighting
        self.ignore_padding = ignore_padding
        self.impl = impl
        self.layer_weights = tuple(layer_weights)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of real images."""
        return batch.image_weight.float().sum()

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Return the loss, summed over the real images."""
        if not output.blocks or targets is None:
            return None
        own = targets.of(self.teacher)
        mask_IN = batch.patch_valid if self.ignore_padding else None
        pair_weight_IN = None
        if self.weighting == "teacher_attention":
            if own.attention is None:
                raise ValueError('SimilarityTerm: weighting="teacher_attention", but the teacher has no attention')
            pair_weight_IN = attention_weights(own.attention, mask_IN)
        weight_I = batch.image_weight.float()
        values = [
            similarity_loss(block.tokens, own.features, weight_I, mask_IN, pair_weight_IN, self.impl)
            for block in output.blocks
        ]
        return LossValue(mean_over_blocks([value.sum for value in values], self.layer_weights), values[0].count)


def similarity_loss(
    tokens_IND: torch.Tensor,
    features_INE: torch.Tensor,
    weight_I: torch.Tensor,
    mask_IN: torch.Tensor | None = None,
    pair_weight_IN: torch.Tensor | None = None,
    impl: str = "auto",
) -> LossValue:
    """Return the loss, summed over images with their weights (0 for an image that is not real), and the count."""
    loss_I = token_similarity(tokens_IND, features_INE, mask_IN, pair_weight_IN, impl=impl)
    return LossValue(sum=(loss_I * weight_I).sum(), count=weight_I.sum())


def attention_weights(attention_IN: torch.Tensor, mask_IN: torch.Tensor | None = None) -> torch.Tensor:
    """Scale the teacher's attention to mean 1 over the valid tokens of each image; [I, N] float32."""
    attention_IN = attention_IN.detach().float()
    valid_IN = torch.ones_like(attention_IN, dtype=torch.bool) if mask_IN is None else mask_IN
    attention_IN = attention_IN.masked_fill(~valid_IN, 0)
    mean_I1 = attention_IN.sum(1, keepdim=True) / valid_IN.sum(1, keepdim=True).clamp_min(1)
    return attention_IN / mean_I1.clamp_min(torch.finfo(torch.float32).tiny)
