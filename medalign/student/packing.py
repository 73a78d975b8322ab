"""How tokens lie in a batch, told to transformers; and SDPA over a packed batch, sample by sample.

flash-attention takes the borders of packed samples as they are. For SDPA and eager attention transformers makes a mask
[L, L] of the whole row, in which most is empty: time and memory would grow with the square of the micro-batch. So SDPA
runs here once a sample, without a mask, and none is made. Models with a sliding window keep theirs.

Shape suffixes: B samples (1 when packed), H heads, L tokens, D width of a head.
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

_apart: ContextVar[bool] = ContextVar("medalign_apart", default=False)


def layout(batch: Batch) -> dict[str, Any]:
    """Arguments for the model's forward pass: `position_ids` [B, L], and what keeps the samples apart."""
    if not batch.lengths:
        positions_BL = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # whichever side the padding is on
        return {"position_ids": positions_BL, "attention_mask": batch.attention_mask.long()}
    bounds = batch.bounds()
    places = torch.arange(batch.input_ids.shape[1], device=bounds.device)
    begins, longest = bounds.int(), max(batch.lengths)
    return {
        "position_ids": places - bounds[batch.sample_of_token()],  # where it begins again, transformers sees a border
        "attention_mask": None,
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
        "sample_lengths": batch.lengths,
    }


@contextmanager
def samples_apart(batch: Batch) -> Iterator[None]:
    """Inside, a packed batch gets no mask that `sdpa` does without."""
    token = _apart.set(bool(batch.lengths))
    try:
        yield
    finally:
        _apart.reset(token)


def sdpa_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for SDPA; None for a packed batch, unless the mask holds a window."""
    if _apart.get() and local_size is None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, local_size=local_size, **kwargs)


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
    """transformers' SDPA, once for each sample of a packed batch that has no mask. Returns [B, L, H, D]."""
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if attention_mask is not None or not sample_lengths:
        return attend(module, query_BHLD, key_BHLD, value_BHLD, attention_mask, **kwargs)
    parts = zip(*(t.split(sample_lengths, dim=2) for t in (query_BHLD, key_BHLD, value_BHLD)), strict=True)
    return torch.cat([attend(module, *part, None, **kwargs)[0] for part in parts], dim=1), None
