"""The specification of token similarity, in plain autograd, with N x N matrices in memory.

    loss_b = 1 / n_b^2 * sum_ij w_i w_j (cos(s_i, s_j) - cos(t_i, t_j))^2        (the paper's L_vis)

over the n_b valid tokens of sample b. B samples, N tokens, D channels.
"""

from __future__ import annotations

import torch

from medalign.kernels.validation import compute_dtype

SMALLEST_NORM = 1e-12  # tokens with a smaller norm have no direction


def token_similarity(
    student_BND: torch.Tensor,
    teacher_BND: torch.Tensor,
    mask_BN: torch.Tensor | None,
    weight_BN: torch.Tensor | None,
) -> torch.Tensor:
    """See `medalign.kernels.token_similarity`."""
    dtype = compute_dtype(student_BND, teacher_BND)
    valid_BN = torch.ones_like(student_BND[..., 0], dtype=torch.bool) if mask_BN is None else mask_BN
    student_BNN = cosines(student_BND.to(dtype), valid_BN)
    teacher_BNN = cosines(teacher_BND.to(dtype), valid_BN)
    squares_BNN = (student_BNN - teacher_BNN) ** 2
    if weight_BN is not None:
        known_BN = weight_BN.to(dtype).masked_fill(~valid_BN, 0)
        squares_BNN = squares_BNN * known_BN[:, :, None] * known_BN[:, None, :]
    pairs_B = valid_BN.sum(1).to(dtype).clamp_min(1) ** 2
    return squares_BNN.sum((1, 2)) / pairs_B


def cosines(features_BND: torch.Tensor, valid_BN: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of tokens [B, N, N]; 0 for tokens that are not valid or have norm 0."""
    features_BND = features_BND.masked_fill(~valid_BN[..., None], 0)
    norm_BN1 = torch.linalg.vector_norm(features_BND, dim=-1, keepdim=True)
    unit_BND = features_BND / norm_BN1.clamp_min(SMALLEST_NORM)
    unit_BND = unit_BND.masked_fill(norm_BN1 <= SMALLEST_NORM, 0)
    cosine_BNN: torch.Tensor = unit_BND @ unit_BND.transpose(1, 2)
    return cosine_BNN
