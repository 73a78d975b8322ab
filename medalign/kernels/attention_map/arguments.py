"""The arguments of an attention map besides query and key: validated once, read by every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMapArgs:
    """Masks and score options, for B samples of L tokens.

    The masks are contiguous; `rows_BL` and `columns_BL` mark valid tokens only. Row i attends to key j if both are in
    the same segment, j is valid, `j <= i` and `i - j < window`. The score `s = scale * q k` becomes
    `softcap * tanh(s / softcap)`. A segment is a sample of the batch or, with `cu_seqlens`, one of the sequences packed
    into the only sample. Each segment has its own mean.
    """

    rows_BL: torch.Tensor
    columns_BL: torch.Tensor
    valid_BL: torch.Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    cu_seqlens: torch.Tensor | None = None  # [S + 1] integers from 0 to L; B is 1

    def bounds(self) -> torch.Tensor:
        """[S + 1]: the first of the B * L tokens of each segment, and the end of the last segment."""
        batch, length = self.rows_BL.shape
        if self.cu_seqlens is None:
            return torch.arange(batch + 1, device=self.rows_BL.device) * length
        return self.cu_seqlens.long().clamp(0, length)

    def segments(self) -> torch.Tensor:
        """[B, L]: the segment of each token. Tokens after the last segment are assigned to it and are never rows."""
        tokens = torch.arange(self.rows_BL.numel(), device=self.rows_BL.device)
        bounds = self.bounds()
        segment = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(len(bounds) - 2)
        return segment.view_as(self.rows_BL)

    def shares(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """1 / (terms of each segment's mean), [S] float32, and the number of rows before each segment, [S + 1]."""
        before = torch.nn.functional.pad(self.rows_BL.flatten().cumsum(0), (1, 0))[self.bounds()]
        return 1 / (heads * before.diff()).clamp_min(1), before
