"""Where the question looks: its attention to the image, mean over heads and question rows (the paper's m)."""

from __future__ import annotations

import math

import torch

from medalign.kernels import dispatch
from medalign.kernels.attention_map import chunked, reference
from medalign.kernels.validation import describe, require_device, require_features, require_mask

_KNOWN = {"reference": reference.attention_map, "chunked": chunked.attention_map}
_CONDITIONS: dispatch.Conditions = {}


def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The causal softmax of the chosen rows over all valid keys, averaged over heads and rows.

    Args:
        query: `[B, H, L, d]`, after the rotary embedding.
        key: `[B, H_kv, L, d]`, after the rotary embedding; query head h reads key head `h // (H / H_kv)`.
        rows: `[B, L]` bool, the tokens whose attention is averaged. Rows at padding do not count.
        columns: `[B, L]` bool, the tokens whose share is returned. The softmax runs over the others too.
        attention_mask: `[B, L]` bool, False at padding; no padding without it.
        scale: factor on the scores; `1 / sqrt(d)` without it.
        impl: "auto", or an implementation by name.

    Returns:
        `[B, L]` float32 (float64 if query or key is), zero outside `columns`. All zero, with zero gradient, for a
        sample without rows. Differentiable in query and key, over all keys.

    Raises:
        ValueError: arguments that do not fit each other.
        KernelError: an `impl` that does not exist.
    """
    _validate(query, key, rows, columns, attention_mask)
    implementation = dispatch.choose("attention_map", impl, (query, key), _KNOWN, _CONDITIONS)
    valid = torch.ones_like(rows) if attention_mask is None else attention_mask
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return dispatch.run(implementation, query, key, rows & valid, columns & valid, valid, scale)


def _validate(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> None:
    operation = "attention_map"
    require_features(operation, "query", query, "BHLd")
    require_features(operation, "key", key, "BHLd")
    batch, heads, length, width = query.shape
    if key.shape != (batch, key.shape[1], length, width) or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"{operation}: key {describe(key)} does not go with query {describe(query)}: batch, length and width "
            "must be equal and the query heads a multiple of the key heads"
        )
    require_device(operation, "key", key, query)
    for name, mask in (("rows", rows), ("columns", columns), ("attention_mask", attention_mask)):
        if mask is not None or name != "attention_mask":
            require_mask(operation, name, mask, (batch, length), query)  # type: ignore[arg-type]
