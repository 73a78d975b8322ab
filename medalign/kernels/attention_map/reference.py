"""The specification of the attention map, in plain autograd, with the whole [B, H, L, L] weights in memory.

    P_h = softmax(scale * Q_h K_h^T)  over the keys that the row attends to (see `AttentionMapArgs`)
    m_j = 1 / (H |R|) * sum_h sum_{i in R} P_h[i, j]   for j in the columns, else 0     (the paper's attention map)

B samples, H query heads, L tokens, D channels of a head, S segments.
"""

from __future__ import annotations

import torch

from medalign.kernels.attention_map.arguments import AttentionMapArgs
from medalign.kernels.validation import compute_dtype


def attention_map(query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, args: AttentionMapArgs) -> torch.Tensor:
    """See `medalign.kernels.attention_map`."""
    dtype = compute_dtype(query_BHLD, key_BHLD)
    heads = query_BHLD.shape[1]
    query_BHLD = query_BHLD.to(dtype).masked_fill(~args.rows_BL[:, None, :, None], 0)
    key_BHLD = key_BHLD.to(dtype).masked_fill(~args.valid_BL[:, None, :, None], 0)
    key_BHLD = key_BHLD.repeat_interleave(heads // key_BHLD.shape[1], dim=1)
    scores_BHLL = args.scale * query_BHLD @ key_BHLD.transpose(2, 3)
    if args.softcap is not None:
        scores_BHLL = args.softcap * (scores_BHLL / args.softcap).tanh()
    segment_BL = args.segments()
    seen_B1LL = _seen(args, segment_BL)[:, None]
    weights_BHLL = scores_BHLL.masked_fill(~seen_B1LL, torch.finfo(dtype).min).softmax(-1)
    chosen_BHLL = weights_BHLL * (args.rows_BL[:, :, None] & args.columns_BL[:, None, :])[:, None]
    return chosen_BHLL.sum((1, 2)) / _terms(args, segment_BL, heads).to(dtype)


def _seen(args: AttentionMapArgs, segment_BL: torch.Tensor) -> torch.Tensor:
    """[B, L, L]: whether row i sees key j."""
    place_L = torch.arange(segment_BL.shape[1], device=segment_BL.device)
    distance_LL = place_L[:, None] - place_L
    near_LL = distance_LL >= 0
    if args.window is not None:
        near_LL &= distance_LL < args.window
    return near_LL & args.valid_BL[:, None, :] & (segment_BL[:, :, None] == segment_BL[:, None, :])


def _terms(args: AttentionMapArgs, segment_BL: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L]: heads times rows of the token's segment, at least 1."""
    rows_S = torch.zeros(int(segment_BL.max()) + 1, dtype=torch.long, device=segment_BL.device)
    rows_S.index_add_(0, segment_BL.flatten(), args.rows_BL.flatten().long())
    return (heads * rows_S).clamp_min(1)[segment_BL]
