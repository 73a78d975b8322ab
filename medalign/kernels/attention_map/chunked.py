"""The attention map from the question rows only, a few rows at a time; [B, H, L, L] is never in memory.

With P the softmax of the scores S = scale * Q K^T of the selected rows, and g_j the gradient of each probability of
column j (the upstream gradient divided by heads and rows; 0 outside the columns):

    dS = P * (g - sum_k P_k g_k)        the sum covers all keys, not only the columns
    dQ = scale * dS K,   dK = scale * dS^T Q

A softcap c changes the scores to c * tanh(S / c) and multiplies dS by 1 - tanh(S / c)^2. The backward pass recomputes
P. Query heads that share a key head are rows of one product, so K is not repeated.

B samples, K key heads, G query heads per key head, R selected rows, L tokens, D channels of a head, F = G * R.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from medalign.kernels.attention_map.arguments import AttentionMapArgs
from medalign.kernels.validation import compute_dtype

SCORE_ELEMENTS = 2**21  # scores in memory at a time (8 MB), or one row of every head if that is more


def attention_map(query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> torch.Tensor:
    """See `medalign.kernels.attention_map`."""
    map_BL: torch.Tensor = _AttentionMap.apply(query_BHLD, key_BKLD, args)
    return map_BL


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> torch.Tensor:
        heads = query_BHLD.shape[1]
        map_BL = query_BHLD.new_zeros(args.rows_BL.shape, dtype=compute_dtype(query_BHLD, key_BKLD))
        for segment in _Segment.each(query_BHLD, key_BKLD, args):
            row_L = map_BL[segment.sample, segment.place]
            for chunk in segment.chunks():
                row_L += chunk.weights_KFL.sum((0, 1))
            row_L /= heads * segment.rows_R.numel()
        ctx.save_for_backward(query_BHLD, key_BKLD)
        ctx.args = args
        return map_BL.mul_(args.columns_BL)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_BL: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLD, key_BKLD = ctx.saved_tensors
        args, heads = ctx.args, query_BHLD.shape[1]
        query_gradient = torch.zeros_like(query_BHLD) if ctx.needs_input_grad[0] else None
        key_gradient = torch.zeros_like(key_BKLD) if ctx.needs_input_grad[1] else None
        for segment in _Segment.each(query_BHLD, key_BKLD, args):
            sample, place, rows_R = segment.sample, segment.place, segment.rows_R
            share = 1 / (heads * rows_R.numel())
            upstream_L = (upstream_BL * args.columns_BL)[sample, place] * share
            sum_KLD = None if key_gradient is None else torch.zeros_like(segment.key_KLD)
            for chunk in segment.chunks():
                scores_KFL = chunk.scores_gradient(upstream_L).mul_(args.scale)
                if sum_KLD is not None:
                    sum_KLD.baddbmm_(scores_KFL.transpose(1, 2), chunk.query_KFD)
                if query_gradient is not None:
                    rows_gradient = (scores_KFL @ segment.key_KLD).unflatten(1, (-1, chunk.rows_R.numel()))
                    where = query_gradient[sample, :, place]
                    where[:, chunk.rows_R] = rows_gradient.flatten(0, 1).to(where.dtype)
            if key_gradient is not None and sum_KLD is not None:
                key_gradient[sample, :, place] = sum_KLD
        return query_gradient, key_gradient, None


class _Chunk(NamedTuple):
    """A few rows of a segment."""

    rows_R: torch.Tensor
    query_KFD: torch.Tensor
    weights_KFL: torch.Tensor  # probabilities
    slope_KFL: torch.Tensor | None  # of the softcap

    def scores_gradient(self, upstream_L: torch.Tensor) -> torch.Tensor:
        """dS, written over the probabilities."""
        inner_KF1 = (self.weights_KFL @ upstream_L)[..., None]
        gradient_KFL = self.weights_KFL.mul_(upstream_L - inner_KF1)
        return gradient_KFL if self.slope_KFL is None else gradient_KFL.mul_(self.slope_KFL)


class _Segment:
    """One sample, or one sequence of a packed batch: its selected rows, and its keys up to the last of them."""

    def __init__(
        self,
        sample: int,
        start: int,
        rows_R: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        args: AttentionMapArgs,
    ) -> None:
        self.sample, self.rows_R, self.args = sample, rows_R, args
        self.place = slice(start, start + int(rows_R[-1]) + 1)
        self.dtype = compute_dtype(query, key)
        self.query_HLD = query[sample, :, self.place]
        self.invalid_L = ~args.valid_BL[sample, self.place]
        self.key_KLD = key[sample, :, self.place].to(self.dtype).masked_fill(self.invalid_L[:, None], 0)

    @classmethod
    def each(cls, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> Iterator[_Segment]:
        """The segments that have rows."""
        batch, length = args.rows_BL.shape
        ends = [0, length] if args.cu_seqlens is None else args.cu_seqlens.tolist()
        for sample in range(batch):
            for start, stop in zip(ends[:-1], ends[1:], strict=True):
                rows_R = args.rows_BL[sample, start:stop].nonzero().flatten()
                if rows_R.numel():
                    yield cls(sample, start, rows_R, query_BHLD, key_BKLD, args)

    def chunks(self) -> Iterator[_Chunk]:
        heads, length = self.query_HLD.shape[:2]
        at_once = max(1, SCORE_ELEMENTS // (heads * length))
        for rows_R in self.rows_R.split(at_once):
            query_KFD = self.query_HLD[:, rows_R].to(self.dtype).unflatten(0, (self.key_KLD.shape[0], -1)).flatten(1, 2)
            scores_KFL = (query_KFD @ self.key_KLD.transpose(1, 2)).mul_(self.args.scale)
            slope_KFL = None
            if (softcap := self.args.softcap) is not None:
                scores_KFL = scores_KFL.div_(softcap).tanh_()
                slope_KFL = 1 - scores_KFL.square()
                scores_KFL = scores_KFL.mul_(softcap)
            scores_KFL.unflatten(1, (-1, rows_R.numel())).masked_fill_(self._hidden(rows_R), float("-inf"))
            yield _Chunk(rows_R, query_KFD, scores_KFL.softmax(-1), slope_KFL)

    def _hidden(self, rows_R: torch.Tensor) -> torch.Tensor:
        """[R, L]: whether a row does not see a key."""
        distance_RL = rows_R[:, None] - torch.arange(len(self.invalid_L), device=rows_R.device)
        hidden_RL = self.invalid_L | (distance_RL < 0)
        if self.args.window is not None:
            hidden_RL |= distance_RL >= self.args.window
        return hidden_RL
