"""The operations as the released code computes them: the baseline of every kernel benchmark.

B samples, H query heads, K key heads, L tokens of a prompt, N image tokens, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_similarity(student_BND: torch.Tensor, teacher_BND: torch.Tensor) -> torch.Tensor:
    """Return the loss per sample [B], from two N x N matrices and their squared difference, which autograd keeps."""
    student_BND, teacher_BND = F.normalize(student_BND, dim=-1), F.normalize(teacher_BND, dim=-1)
    difference_BNN = student_BND @ student_BND.transpose(1, 2) - teacher_BND @ teacher_BND.transpose(1, 2)
    return (difference_BNN**2).mean((1, 2))


def attention_map(
    query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, rows_BL: torch.Tensor, columns_BL: torch.Tensor
) -> torch.Tensor:
    """Return the map [B, L] in float32, from the attention weights of every row and head."""
    return map_from_weights(attention_weights(query_BHLD, key_BKLD), rows_BL, columns_BL)


def attention_weights(query_BHLD: torch.Tensor, key_BKLD: torch.Tensor) -> torch.Tensor:
    """Return the causal attention weights [B, H, L, L] in float32."""
    key_BHLD = key_BKLD.repeat_interleave(query_BHLD.shape[1] // key_BKLD.shape[1], dim=1)
    scores_BHLL: torch.Tensor = query_BHLD @ key_BHLD.transpose(2, 3) * query_BHLD.shape[-1] ** -0.5
    future_LL = torch.ones_like(scores_BHLL[0, 0], dtype=torch.bool).triu(1)
    return scores_BHLL.masked_fill(future_LL, float("-inf")).softmax(-1, dtype=torch.float32)


def map_from_weights(weights_BHRL: torch.Tensor, rows_BR: torch.Tensor, columns_BL: torch.Tensor) -> torch.Tensor:
    """Return the mean [B, L] over heads and the marked rows; zero outside the columns."""
    chosen_BHRL = weights_BHRL * (rows_BR[:, :, None] & columns_BL[:, None, :])[:, None]
    return chosen_BHRL.sum((1, 2)) / (weights_BHRL.shape[1] * rows_BR.sum(1, keepdim=True))
