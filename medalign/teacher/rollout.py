"""The class token's attention through all blocks: attention rollout.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: with A_l the attention of block l, the mean
over its heads, and half of each token kept by the residual stream,

    R_0 = I,    R_l = (A_l + I) / 2  R_(l-1)

and the target is the class token's row of the last R. Each row sums to 1.

Shape suffixes: I images, K tokens, M patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medalign.teacher.towers import ClassTokenTower


class Rollout:
    """Collects the product of the blocks' attention while a tower runs inside the context.

    It is formed block by block: three float32 matrices [K, K] per image are in memory at a time, for any depth.

    Args:
        tower: the tower.
    """

    def __init__(self, tower: ClassTokenTower) -> None:
        self._tower = tower
        self._product: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Rollout:
        self._handles = [block.register_forward_pre_hook(self._add) for block in self._tower.blocks()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def attention(self) -> torch.Tensor:
        """Return the class token's row for the patches, [I, M], after the tower has run."""
        assert self._product is not None
        return self._product[:, 0, self._tower.prefix_tokens :]

    def _add(self, block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        mixed = self._tower.block_attention(block, inputs[0])
        mixed.diagonal(dim1=1, dim2=2).add_(1)
        mixed.mul_(0.5)
        self._product = mixed if self._product is None else torch.bmm(mixed, self._product)
