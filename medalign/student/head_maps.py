"""The attention maps of each head, at several blocks at once. An instrument: the training captures one mean map.

Shape suffixes: B samples, H heads, L tokens, D head dimension, I images, N cells per image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from medalign.contracts import Batch
from medalign.geometry import gather_images
from medalign.kernels import attention_map
from medalign.student.capture import ATTRIBUTE
from medalign.student.model import Student


class HeadCapture:
    """Computes the map of each head of one block for several sets of rows. It takes the place of `AttentionCapture`.

    Args:
        rows: sets of query positions, each [B, L] bool; a map is the mean over a set.
        columns: [B, L] bool, key positions to report.
        valid: [B, L] bool, False at padding.
    """

    def __init__(self, rows: Sequence[torch.Tensor], columns: torch.Tensor, valid: torch.Tensor) -> None:
        self._rows, self._columns, self._valid = rows, columns, valid
        self.maps: list[torch.Tensor] = []  # one [B, H, L] float32 per set of rows; set by the forward pass

    def capture(
        self, query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, scale: float | None, attention_kwargs: Mapping[str, Any]
    ) -> None:
        """Compute `maps`; see `AttentionCapture.capture`. To the operation, each head is a sample with one head."""
        batch, heads = query_BHLD.shape[:2]
        key_BHLD = key_BHLD.repeat_interleave(heads // key_BHLD.shape[1], dim=1)
        query, key = (tensor.flatten(0, 1)[:, None] for tensor in (query_BHLD, key_BHLD))
        columns, valid = (mask.repeat_interleave(heads, dim=0) for mask in (self._columns, self._valid))
        self.maps = [
            attention_map(
                query,
                key,
                rows.repeat_interleave(heads, dim=0),
                columns,
                attention_mask=valid,
                scale=scale,
                softcap=attention_kwargs.get("softcap"),
                window=attention_kwargs.get("sliding_window"),
            ).unflatten(0, (batch, heads))
            for rows in self._rows
        ]


@torch.no_grad()
def head_maps(student: Student, batch: Batch, rows: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Run the student once, and return the map of each head of each block.

    Args:
        student: in evaluation mode.
        batch: padded, with at least one image.
        rows: sets of query positions, each [B, L] bool.

    Returns:
        For each set of rows, one [I, N, H] float32 per block: the share of the rows' attention on each cell.

    Raises:
        ValueError: the batch is packed.
        RuntimeError: a block did not run the registered attention.
    """
    if batch.lengths:
        raise ValueError("maps of heads need a padded batch, and this one is packed")
    captures = [HeadCapture(rows, batch.cells, batch.attention_mask) for _ in student.spec.attentions]
    with _in_place(student.spec.attentions, captures):
        student(batch, tap=False)
    images, cells = len(batch.image_weight), student.spec.grid.size
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for block, capture in enumerate(captures):
        if not capture.maps:
            raise RuntimeError(f"block {block} did not run the registered attention, so it has no map")
        for maps, map_BHL in zip(found, capture.maps, strict=True):
            maps.append(gather_images(map_BHL.transpose(1, 2), batch.cells, images, cells))
    return found


@contextmanager
def _in_place(attentions: Sequence[nn.Module], captures: Sequence[HeadCapture]) -> Iterator[None]:
    """Attach the captures inside the context, in the place of those that are there."""
    before = [getattr(attention, ATTRIBUTE, None) for attention in attentions]
    try:
        for attention, capture in zip(attentions, captures, strict=True):
            setattr(attention, ATTRIBUTE, capture)
        yield
    finally:
        for attention, own in zip(attentions, before, strict=True):
            setattr(attention, ATTRIBUTE, own)
