"""The attention map from the question rows alone, a few rows at a time; never [B, H, L, L].

With P the softmax of the scores S = scale * Q K^T of the chosen rows, and g_j the gradient on each probability of
column j (the upstream gradient over heads and rows; 0 outside the columns):

    dS = P * (g - sum_k P_k g_k)        the sum over all keys, not the columns alone
    dQ = scale * dS K,   dK = scale * dS^T Q

The backward pass computes P again. Query heads that share a key head are rows of one product, so K is not repeated.

B samples, K key heads, G query heads to a key head, R chosen rows, L tokens, D channels of a head, F = G * R.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from medalign.kernels.validation import compute_dtype

SCORE_ELEMENTS = 2**21  # scores held at a time (8 MB), or one row of every head if that is more


def attention_map(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    rows_BL: torch.Tensor,
    columns_BL: torch.Tensor,
    valid_BL: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `medalign.kernels.attention_map`; `rows` and `columns` hold valid tokens alone."""
    return _AttentionMap.apply(query_BHLD, key_BKLD, rows_BL, columns_BL, valid_BL, scale)


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHLD: torch.Tensor,
        key_BKLD: torch.Tensor,
        rows_BL: torch.Tensor,
        columns_BL: torch.Tensor,
        valid_BL: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        heads = query_BHLD.shape[1]
        map_BL = query_BHLD.new_zeros(rows_BL.shape, dtype=compute_dtype(query_BHLD, key_BKLD))
        for sample in _Sample.each(query_BHLD, key_BKLD, rows_BL, valid_BL, scale):
            row_BL = map_BL[sample.number]
            for _, _, weights_KFL in sample.chunks():
                row_BL[: sample.length] += weights_KFL.sum((0, 1))
            row_BL /= heads * sample.rows_R.numel()
        ctx.save_for_backward(query_BHLD, key_BKLD, rows_BL, columns_BL, valid_BL)
        ctx.scale = scale
        return map_BL.mul_(columns_BL)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_BL: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLD, key_BKLD, rows_BL, columns_BL, valid_BL = ctx.saved_tensors
        heads = query_BHLD.shape[1]
        query_gradient = torch.zeros_like(query_BHLD) if ctx.needs_input_grad[0] else None
        key_gradient = torch.zeros_like(key_BKLD) if ctx.needs_input_grad[1] else None
        for sample in _Sample.each(query_BHLD, key_BKLD, rows_BL, valid_BL, ctx.scale):
            share = 1 / (heads * sample.rows_R.numel())
            upstream_L = (upstream_BL[sample.number] * columns_BL[sample.number])[: sample.length] * share
            sum_KLD = None if key_gradient is None else torch.zeros_like(sample.key_KLD)
            for rows_R, query_KFD, weights_KFL in sample.chunks():
                inner_KF1 = (weights_KFL @ upstream_L)[..., None]
                scores_KFL = weights_KFL.mul_(upstream_L - inner_KF1).mul_(ctx.scale)
                if sum_KLD is not None:
                    sum_KLD.baddbmm_(scores_KFL.transpose(1, 2), query_KFD)
                if query_gradient is not None:
                    rows_gradient = (scores_KFL @ sample.key_KLD).unflatten(1, (-1, rows_R.numel())).flatten(0, 1)
                    query_gradient[sample.number][:, rows_R] = rows_gradient.to(query_gradient.dtype)
            if key_gradient is not None and sum_KLD is not None:
                key_gradient[sample.number, :, : sample.length] = sum_KLD
        return query_gradient, key_gradient, None, None, None, None


class _Sample:
    """One sample: its chosen rows, and its keys up to the last of them."""

    def __init__(
        self,
        number: int,
        query_HLD: torch.Tensor,
        key_KLD: torch.Tensor,
        rows_R: torch.Tensor,
        valid_L: torch.Tensor,
        scale: float,
    ):
        self.number, self.query_HLD, self.rows_R, self.scale = number, query_HLD, rows_R, scale
        self.length = int(rows_R[-1]) + 1
        self.dtype = compute_dtype(query_HLD, key_KLD)
        self.invalid_L = ~valid_L[: self.length]
        self.key_KLD = key_KLD[:, : self.length].to(self.dtype).masked_fill(self.invalid_L[:, None], 0)

    @classmethod
    def each(
        cls,
        query_BHLD: torch.Tensor,
        key_BKLD: torch.Tensor,
        rows_BL: torch.Tensor,
        valid_BL: torch.Tensor,
        scale: float,
    ) -> Iterator[_Sample]:
        """The samples that have rows."""
        for number in range(rows_BL.shape[0]):
            rows_R = rows_BL[number].nonzero().flatten()
            if rows_R.numel():
                yield cls(number, query_BHLD[number], key_BKLD[number], rows_R, valid_BL[number], scale)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A few rows at a time: their positions [R], queries [K, G * R, D] and probabilities [K, G * R, length]."""
        heads, key_heads = self.query_HLD.shape[0], self.key_KLD.shape[0]
        at_once = max(1, SCORE_ELEMENTS // (heads * self.length))
        positions_L = torch.arange(self.length, device=self.rows_R.device)
        for rows_R in self.rows_R.split(at_once):
            query_KFD = self.query_HLD[:, rows_R].to(self.dtype).unflatten(0, (key_heads, -1)).flatten(1, 2)
            scores_KFL = (query_KFD @ self.key_KLD.transpose(1, 2)).mul_(self.scale)
            hidden_RL = self.invalid_L | (positions_L > rows_R[:, None])
            scores_KGRL = scores_KFL.unflatten(1, (-1, rows_R.numel()))
            scores_KGRL.masked_fill_(hidden_RL, float("-inf"))
            yield rows_R, query_KFD, scores_KFL.softmax(-1)
