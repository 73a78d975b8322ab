"""The specification of the attention map, by plain autograd; the whole [B, H, L, L] and all.

    P_h = softmax(scale * Q_h K_h^T)  over the valid keys j <= i
    m_j = 1 / (H |R|) * sum_h sum_{i in R} P_h[i, j]   for j in the columns, else 0     (the paper's attention map)

B samples, H query heads, L tokens, D channels of a head.
"""

from __future__ import annotations

import torch

from medalign.kernels.validation import compute_dtype


def attention_map(
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    rows_BL: torch.Tensor,
    columns_BL: torch.Tensor,
    valid_BL: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `medalign.kernels.attention_map`; `rows` and `columns` hold valid tokens alone."""
    dtype = compute_dtype(query_BHLD, key_BHLD)
    heads, length = query_BHLD.shape[1:3]
    query_BHLD = query_BHLD.to(dtype).masked_fill(~rows_BL[:, None, :, None], 0)
    key_BHLD = key_BHLD.to(dtype).masked_fill(~valid_BL[:, None, :, None], 0)
    key_BHLD = key_BHLD.repeat_interleave(heads // key_BHLD.shape[1], dim=1)
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=query_BHLD.device).tril()
    seen_B1LL = (causal_LL & valid_BL[:, None, :])[:, None]
    scores_BHLL = scale * query_BHLD @ key_BHLD.transpose(2, 3)
    weights_BHLL = scores_BHLL.masked_fill(~seen_B1LL, torch.finfo(dtype).min).softmax(-1)
    chosen_BHLL = weights_BHLL * (rows_BL[:, :, None] & columns_BL[:, None, :])[:, None]
    terms_B1 = heads * rows_BL.sum(1, keepdim=True).to(dtype).clamp_min(1)
    return chosen_BHLL.sum((1, 2)) / terms_B1
