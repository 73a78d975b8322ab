"""The attention from the question's tokens to the image, averaged over heads and question rows (the paper's m)."""

from __future__ import annotations

import math

import torch

from medalign.kernels import dispatch, gpu
from medalign.kernels.attention_map import chunked, reference, triton
from medalign.kernels.attention_map.arguments import AttentionMapArgs
from medalign.kernels.validation import describe, require_device, require_features, require_mask, warn_unless_finite

_KNOWN = {"reference": reference.attention_map, "chunked": chunked.attention_map, "triton": triton.attention_map}
_CONDITIONS: dispatch.Conditions = {"triton": gpu.refusal}
_OPERATION = "attention_map"


def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Average the causal attention of the given rows over heads and rows; the softmax covers all valid keys.

    Args:
        query: `[B, H, L, d]`, after the rotary embedding.
        key: `[B, H_kv, L, d]`, after the rotary embedding; query head h reads key head `h // (H / H_kv)`.
        rows: `[B, L]` bool, the tokens whose attention is averaged. Rows at padding are ignored.
        columns: `[B, L]` bool, the tokens whose attention is returned. The softmax also covers the other tokens.
        attention_mask: `[B, L]` bool, False at padding; None if there is no padding.
        scale: factor on the scores; None for `1 / sqrt(d)`.
        softcap: scores s become `softcap * tanh(s / softcap)`, as in Gemma 2; None for no cap.
        window: each row attends to this many tokens, itself included; None for all earlier tokens.
        cu_seqlens: `[S + 1]` integers from 0 to L, for a packed batch: B is 1 and holds S sequences end to end, where
            sequence s occupies tokens `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1`. Each sequence attends only to itself
            and has its own mean.
        impl: "auto", or an implementation by name.

    Returns:
        `[B, L]` float32 (float64 if query or key is float64), zero outside `columns`. A sample without rows gives zero,
        with zero gradient. Differentiable with respect to query and key, including keys outside `columns`.

    Raises:
        ValueError: arguments do not match each other.
        KernelError: `impl` does not exist or cannot run; the message gives the reason and the remedy.
    """
    _validate(query, key, rows, columns, attention_mask)
    _validate_options(query, softcap, window, cu_seqlens)
    implementation = dispatch.choose(_OPERATION, impl, (query, key), _KNOWN, _CONDITIONS)
    valid = torch.ones_like(rows) if attention_mask is None else attention_mask
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows, columns, valid = ((mask & valid).contiguous() for mask in (rows, columns, valid))
    args = AttentionMapArgs(rows, columns, valid, scale, softcap, window, cu_seqlens)
    found = dispatch.run(implementation, query, key, args)
    warn_unless_finite(_OPERATION, found, query=query, key=key)
    return found


def _validate(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> None:
    require_features(_OPERATION, "query", query, "BHLd")
    require_features(_OPERATION, "key", key, "BHLd")
    batch, heads, length, width = query.shape
    if key.shape != (batch, key.shape[1], length, width) or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"{_OPERATION}: key {describe(key)} does not match query {describe(query)}: batch, length and width "
            "must be equal and the query heads a multiple of the key heads"
        )
    require_device(_OPERATION, "key", key, query)
    for name, mask in (("rows", rows), ("columns", columns), ("attention_mask", attention_mask)):
        if mask is not None or name != "attention_mask":
            require_mask(_OPERATION, name, mask, (batch, length), query)  # type: ignore[arg-type]


def _validate_options(
    query: torch.Tensor, softcap: float | None, window: int | None, cu_seqlens: torch.Tensor | None
) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{_OPERATION}: softcap must be a positive number, got {softcap}; omit it for none")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{_OPERATION}: window must be an integer of at least 1, got {window}; omit it for none")
    if cu_seqlens is None:
        return
    batch, _, length, _ = query.shape
    if not torch.is_tensor(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        got = describe(cu_seqlens) if torch.is_tensor(cu_seqlens) else type(cu_seqlens).__name__
        raise ValueError(f"{_OPERATION}: cu_seqlens must be an int32 or int64 tensor [S + 1], got {got}")
    if batch != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{_OPERATION}: cu_seqlens of {len(cu_seqlens)} entries needs one sample of packed sequences and "
            f"at least 2 entries, got query {describe(query)}"
        )
    require_device(_OPERATION, "cu_seqlens", cu_seqlens, query)
    # The values are checked on the CPU only: on a GPU, the host would have to wait for the device at every step.
    if cu_seqlens.device.type == "cpu":
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (steps < 0).any():
            raise ValueError(
                f"{_OPERATION}: cu_seqlens must increase from 0 to the query's {length} tokens, "
                f"got {cu_seqlens.tolist()}"
            )
