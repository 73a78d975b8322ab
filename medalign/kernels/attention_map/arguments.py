"""What one call of the attention map looks at, apart from query and key: checked once, read by every path."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMapArgs:
    """B samples, L tokens; the masks are contiguous, and `rows` and `columns` hold valid tokens alone.

    Key j is seen from row i of the same segment if it is valid, `j <= i` and `i - j < window`. The score
    `s = scale * q k` counts as `softcap * tanh(s / softcap)`. A segment is a sample of the batch; with `cu_seqlens`,
    it is one of the sequences that lie end to end in the only sample. Each segment has a mean of its own.
    """

    rows_BL: torch.Tensor
    columns_BL: torch.Tensor
    valid_BL: torch.Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    cu_seqlens: torch.Tensor | None = None  # [S + 1] integers from 0 to L; B is 1

    def bounds(self) -> torch.Tensor:
        """[S + 1]: where each segment begins among the B * L tokens, and where the last one ends."""
        batch, length = self.rows_BL.shape
        if self.cu_seqlens is None:
            return torch.arange(batch + 1, device=self.rows_BL.device) * length
        return self.cu_seqlens.long().clamp(0, length)

    def segments(self) -> torch.Tensor:
        """[B, L]: the segment of each token; tokens after the last one count to it and are never rows."""
        tokens = torch.arange(self.rows_BL.numel(), device=self.rows_BL.device)
        bounds = self.bounds()
        segment = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(len(bounds) - 2)
        return segment.view_as(self.rows_BL)

    def shares(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One over the terms of each segment's mean, [S] float32, and the rows before each segment, [S + 1]."""
        before = torch.nn.functional.pad(self.rows_BL.flatten().cumsum(0), (1, 0))[self.bounds()]
        return 1 / (heads * before.diff()).clamp_min(1), before
