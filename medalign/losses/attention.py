"""Attention distillation: the distance of the student's attention map from the teacher's (the paper's L_att).

I or B images, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from medalign.config.schema.losses import Normalization
from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets
from medalign.losses.term import LossTerm, check_choice, mean_over_blocks

NORMALIZATIONS = get_args(Normalization)
SMALLEST = 1e-12  # a map with a smaller sum has no loss; inside the logarithm, smaller shares are raised to this value


class AttentionTerm(LossTerm):
    """The attention loss.

    Args:
        coefficient: the paper's beta.
        name: the name of the term.
        teacher: which teacher's attention is the target: 0 is the first (`TeacherTargets.of`).
        normalize: how attention becomes a distribution: "sum", "softmax" or "official"; see `attention_kl`.
        ignore_padding: whether to exclude patches that show only canvas padding.
        layer_weights: one weight per tapped block, for the mean over them; empty if all are equal.

    Raises:
        ValueError: a negative coefficient, or an unknown `normalize`.
    """

    def __init__(
        self,
        coefficient: float,
        *,
        name: str = "attention",
        teacher: int = 0,
        normalize: str = "sum",
        ignore_padding: bool = False,
        layer_weights: Sequence[float] = (),
    ) -> None:
        super().__init__(name, coefficient)
        check_choice("normalize", normalize, NORMALIZATIONS)
        self.teacher = teacher
        self.normalize = normalize
        self.ignore_padding = ignore_padding
        self.layer_weights = tuple(layer_weights)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of real images whose sample has rows of the attention loss."""
        return image_weights(batch).sum()

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Return the divergence, summed over the images that count."""
        target = None if targets is None else targets.of(self.teacher).attention
        if not output.blocks or target is None:
            return None
        mask_IN = batch.patch_valid if self.ignore_padding else None
        weight_I = image_weights(batch)
        sums = []
        for block in output.blocks:
            divergence_I = attention_kl(block.attention, target, mask_IN, normalize=self.normalize)
            sums.append((divergence_I * weight_I).sum())
        return LossValue(sum=mean_over_blocks(sums, self.layer_weights), count=weight_I.sum())


def attention_kl(
    student_map: torch.Tensor,
    teacher_map: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    normalize: str = "sum",
) -> torch.Tensor:
    """Compute `KL(t || p)` of the normalized maps t (teacher) and p (student) of each image.

    Args:
        student_map: `[B, N]`, not negative; receives the gradient.
        teacher_map: `[B, N]`, not negative; a constant.
        mask: `[B, N]` bool; positions where it is False are excluded, also from the normalization.
        normalize: "sum": divided by the sum. "softmax": softmax of the N values. "official": divided by the L2
            norm, and the sum over N divided by N, as in the released code; the result may be negative.

    Returns:
        `[B]` float32 (float64 if both maps are float64). It is 0, with gradient 0, where the sum of either map is at
        most `SMALLEST` (1e-12): a question without rows, or an image without valid patches. Shares of p below
        `SMALLEST` are raised to `SMALLEST` and receive no gradient through the logarithm.

    Raises:
        ValueError: `normalize` is unknown, or a shape or dtype does not match.
    """
    _validate(student_map, teacher_map, mask, normalize)
    dtype = torch.float64 if student_map.dtype == teacher_map.dtype == torch.float64 else torch.float32
    student_BN, teacher_BN = student_map.to(dtype), teacher_map.detach().to(dtype)
    valid_BN = torch.ones_like(student_BN, dtype=torch.bool) if mask is None else mask
    student_BN, teacher_BN = student_BN.masked_fill(~valid_BN, 0), teacher_BN.masked_fill(~valid_BN, 0)
    known_B = (student_BN.detach().sum(1) > SMALLEST) & (teacher_BN.sum(1) > SMALLEST)
    # Maps without mass are replaced by uniform ones, so that no gradient is NaN before it is masked.
    student_BN = torch.where(known_B[:, None], student_BN, valid_BN.to(dtype))
    teacher_BN = torch.where(known_B[:, None], teacher_BN, valid_BN.to(dtype))
    share_BN, log_share_BN = _normalized(teacher_BN, valid_BN, normalize)
    _, log_student_BN = _normalized(student_BN, valid_BN, normalize)
    terms_BN = (share_BN * (log_share_BN - log_student_BN)).masked_fill(~valid_BN, 0)
    divergence_B = terms_BN.sum(1)
    if normalize == "official":
        divergence_B = divergence_B / valid_BN.sum(1).clamp_min(1)
    return divergence_B.masked_fill(~known_B, 0)


def _normalized(map_BN: torch.Tensor, valid_BN: torch.Tensor, normalize: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalized map and its logarithm, both finite everywhere."""
    if normalize == "softmax":
        log_BN = map_BN.masked_fill(~valid_BN, torch.finfo(map_BN.dtype).min).log_softmax(1)
        return log_BN.exp(), log_BN
    size_B1 = map_BN.sum(1, keepdim=True) if normalize == "sum" else torch.linalg.vector_norm(map_BN, dim=1)[:, None]
    share_BN = map_BN / size_B1.clamp_min(SMALLEST)
    return share_BN, share_BN.clamp_min(SMALLEST).log()


def _validate(student_map: torch.Tensor, teacher_map: torch.Tensor, mask: torch.Tensor | None, normalize: str) -> None:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f'attention_kl: normalize="{normalize}" is not one of {", ".join(NORMALIZATIONS)}')
    if student_map.ndim != 2 or student_map.shape != teacher_map.shape:
        raise ValueError(
            f"attention_kl: student_map {tuple(student_map.shape)} and teacher_map {tuple(teacher_map.shape)} "
            "must both be [B, N]"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student_map.shape):
        raise ValueError(
            f"attention_kl: mask must be bool {tuple(student_map.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )


def image_weights(batch: Batch) -> torch.Tensor:
    """Return 1 for each real image whose sample has rows of the attention loss, otherwise 0; [I] float32."""
    row_of_sample = batch.sample_of_token().flatten(), batch.rows.flatten().float()
    samples = len(batch.bounds()) - 1
    has_rows_S = torch.zeros(samples, device=batch.input_ids.device).index_add_(0, *row_of_sample) > 0
    return batch.image_weight.float() * has_rows_S[batch.image_sample]
