"""Token similarity in memory linear in the tokens: value and gradient are computed together, panel by panel.

With unit rows s_i, t_i, and D_ij = s_i . s_j - t_i . t_j:

    loss   = 1 / n^2 * sum_ij w_i w_j D_ij^2
    dl/ds_i = 4 / n^2 * sum_j w_i w_j D_ij s_j
    dl/dx_i = (dl/ds_i - (dl/ds_i . s_i) s_i) / |x_i|          x_i is the token before normalization

The gradient is computed with the value and stored (see `stored_gradient`). D is symmetric: a panel of rows a to e needs
only the columns from a on, and its transpose serves the rows below it. That takes N^2 (3 d + b) operations, compared
with 2 N^2 (3 d + b) for autograd on the eager form.

Expanding the square into d x d Gram matrices would avoid panels, but it would compute a loss near 0.001 as a difference
of numbers near 1, for which float32 is not precise enough.

G samples of a group, R rows of a panel, C columns of a panel, N tokens, D channels.
"""

from __future__ import annotations

import torch

from medalign.kernels.token_similarity.reference import SMALLEST_NORM
from medalign.kernels.token_similarity.stored_gradient import with_stored_gradient
from medalign.kernels.validation import compute_dtype

TALLEST_PANEL = 256  # rows; enough for matrix products at full speed
LEAST_PANELS = 4  # taller panels save less of the symmetric work
GROUP_ELEMENTS = 2**18  # samples are computed together while one panel of all of them stays below this (1 MB)


def token_similarity(
    student_BND: torch.Tensor,
    teacher_BND: torch.Tensor,
    mask_BN: torch.Tensor | None,
    weight_BN: torch.Tensor | None,
) -> torch.Tensor:
    """See `medalign.kernels.token_similarity`."""
    samples, tokens = student_BND.shape[:2]
    dtype = compute_dtype(student_BND, teacher_BND)
    height = panel_height(tokens)
    together = max(1, GROUP_ELEMENTS // max(1, height * tokens))

    def compute(gradient_BND: torch.Tensor | None) -> torch.Tensor:
        loss_B = student_BND.new_zeros(samples, dtype=dtype)
        for first in range(0, samples, together):
            group = slice(first, first + together)
            mask_GN = None if mask_BN is None else mask_BN[group]
            weight_GN = None if weight_BN is None else weight_BN[group].to(dtype)
            loss_B[group], gradient_GND = _group(
                student_BND[group], teacher_BND[group], mask_GN, weight_GN, dtype, height, gradient_BND is not None
            )
            if gradient_BND is not None and gradient_GND is not None:
                gradient_BND[group] = gradient_GND
        return loss_B

    return with_stored_gradient(student_BND, dtype, compute)


def panel_height(tokens: int) -> int:
    """Rows per panel."""
    return max(1, min(TALLEST_PANEL, -(-tokens // LEAST_PANELS)))


def _group(
    student_GND: torch.Tensor,
    teacher_GND: torch.Tensor,
    mask_GN: torch.Tensor | None,
    weight_GN: torch.Tensor | None,
    dtype: torch.dtype,
    height: int,
    differentiate: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss [G] and its gradient [G, N, D] for samples that are computed together."""
    samples, tokens = student_GND.shape[:2]
    unit_GND, inverse_GN = _unit_rows(student_GND, mask_GN, dtype)
    target_GND, _ = _unit_rows(teacher_GND, mask_GN, dtype)
    if weight_GN is not None and mask_GN is not None:
        weight_GN = weight_GN.masked_fill(~mask_GN, 0)
    sum_G = unit_GND.new_zeros(samples)
    gradient_GND = torch.zeros_like(unit_GND) if differentiate else None
    for top in range(0, tokens, height):
        rows, below = slice(top, min(top + height, tokens)), slice(min(top + height, tokens), tokens)
        panel_GRC = unit_GND[:, rows] @ unit_GND[:, top:].transpose(1, 2)
        panel_GRC.baddbmm_(target_GND[:, rows], target_GND[:, top:].transpose(1, 2), alpha=-1)
        if weight_GN is None:
            weighted_GRC = panel_GRC
        else:
            weighted_GRC = panel_GRC * weight_GN[:, rows, None] * weight_GN[:, None, top:]
        # Outside the square on the diagonal, each entry also stands for its mirror image.
        side = rows.stop - rows.start
        squares_GRC = panel_GRC * weighted_GRC
        sum_G += 2 * squares_GRC.sum((1, 2)) - squares_GRC[:, :, :side].sum((1, 2))
        del squares_GRC
        if gradient_GND is not None:
            gradient_GND[:, rows].baddbmm_(weighted_GRC, unit_GND[:, top:])
            gradient_GND[:, below].baddbmm_(weighted_GRC[:, :, side:].transpose(1, 2), unit_GND[:, rows])
    valid_G = sum_G.new_full((samples,), tokens) if mask_GN is None else mask_GN.sum(1).to(dtype)
    pairs_G = valid_G.clamp_min(1).square()
    if gradient_GND is not None:
        _through_normalization(gradient_GND, unit_GND, inverse_GN * (4 / pairs_G)[:, None], height)
    return sum_G / pairs_G, gradient_GND


def _unit_rows(
    features_GND: torch.Tensor, mask_GN: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens scaled to norm 1, and the scale factors; both 0 where the token is not valid or has no direction."""
    unit_GND = features_GND.to(dtype, copy=True)
    if mask_GN is not None:
        unit_GND.masked_fill_(~mask_GN[..., None], 0)
    norm_GN = torch.linalg.vector_norm(unit_GND, dim=-1)
    inverse_GN = norm_GN.clamp_min(SMALLEST_NORM).reciprocal().masked_fill(norm_GN <= SMALLEST_NORM, 0)
    return unit_GND.mul_(inverse_GN[..., None]), inverse_GN


def _through_normalization(
    gradient_GND: torch.Tensor, unit_GND: torch.Tensor, factor_GN: torch.Tensor, height: int
) -> None:
    """Turn dl/ds into dl/dx in place, panel by panel."""
    for top in range(0, unit_GND.shape[1], height):
        rows = slice(top, top + height)
        gradient_GRD, unit_GRD = gradient_GND[:, rows], unit_GND[:, rows]
        along_GR = (gradient_GRD * unit_GRD).sum(-1, keepdim=True)
        gradient_GRD.sub_(along_GR * unit_GRD).mul_(factor_GN[:, rows, None])
