"""Arguments that describe a batch's layout to transformers, and SDPA for packed batches.

flash-attention takes the boundaries of packed samples directly. For SDPA and eager attention, transformers builds a
mask [L, L] over the packed row, most of which is masked out: time and memory would grow with the square of the
micro-batch size. Therefore SDPA runs here once per sample, without a mask, and the mask is not built. Models with a
sliding window keep their mask.

Shape suffixes: B samples (1 when packed), H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medalign.contracts import Batch

_skip_mask: ContextVar[bool] = ContextVar("medalign_skip_mask", default=False)


def forward_arguments(batch: Batch) -> dict[str, Any]:
    """Return arguments for the model's forward pass.

    Returns:
        `position_ids` [B, L] and `attention_mask` [B, L]; for a packed batch, the boundaries of the samples in place
        of the mask.
    """
    if not batch.lengths:
        positions_BL = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # padding may be on either side
        return {"position_ids": positions_BL, "attention_mask": batch.attention_mask.long()}
    bounds = batch.bounds()
    places = torch.arange(batch.input_ids.shape[1], device=bounds.device)
    starts, longest = bounds.int(), max(batch.lengths)
    return {
        "position_ids": places - bounds[batch.sample_of_token()],  # transformers starts a new sample at each 0
        "attention_mask": None,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "sample_lengths": batch.lengths,
    }


@contextmanager
def without_packed_mask(batch: Batch) -> Iterator[None]:
    """Inside the context, no mask is built for a packed batch unless the model has a sliding window."""
    token = _skip_mask.set(bool(batch.lengths))
    try:
        yield
    finally:
        _skip_mask.reset(token)


def sdpa_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return transformers' mask for SDPA, or None for a packed batch without a sliding window."""
    if _skip_mask.get() and local_size is None:
        return None
    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, local_size=local_size, **kwargs)
    return mask


def sdpa(
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sample_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run transformers' SDPA, once per sample for a packed batch without a mask.

    Returns:
        The attention output [B, L, H, D] and None in place of the attention weights.
    """
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if attention_mask is not None or not sample_lengths:
        result: tuple[torch.Tensor, None] = attend(module, query_BHLD, key_BHLD, value_BHLD, attention_mask, **kwargs)
        return result
    parts = zip(*(t.split(sample_lengths, dim=2) for t in (query_BHLD, key_BHLD, value_BHLD)), strict=True)
    return torch.cat([attend(module, *part, None, **kwargs)[0] for part in parts], dim=1), None
