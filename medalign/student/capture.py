"""A tap on one decoder block: the question's attention, read without materializing anyone else's.

Every block keeps its fast attention. The functions registered with transformers here call that backend for the
block's output; at the one block that carries a `Tap`, they also hand post-rotary query and key to
`kernels.attention_map`, which computes the question's rows alone. transformers finds both functions by name in
`config._attn_implementation`; the mask function must be registered too, or the model would lose its causality
without a word (`check_causality` in `student.model` makes sure).

Shape suffixes: B samples, H heads, L tokens, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask

from medalign.kernels import attention_map
from medalign.student import packing

BACKENDS = ("sdpa", "flash_attention_2", "eager")
# What transformers knows each backend by. A name that holds "flash" would be looked for among its own kernels.
_NAMES = {"sdpa": "medalign_sdpa", "flash_attention_2": "medalign_fa2", "eager": "medalign_eager"}
_ATTRIBUTE = "medalign_tap"


@dataclass
class Tap:
    """What the tapped block needs for one forward pass, and what it gives back."""

    rows: torch.Tensor | None = None  # [B, L] bool; query positions to average
    columns: torch.Tensor | None = None  # [B, L] bool; key positions to report
    valid: torch.Tensor | None = None  # [B, L] bool; False at padding
    map: torch.Tensor | None = None  # [B, L] float32, after the pass
    impl: str = "auto"

    @contextmanager
    def reading(self, rows: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> Iterator[Tap]:
        """Tap the forward passes inside the context; `map` stays readable after it."""
        self.rows, self.columns, self.valid, self.map = rows, columns, valid, None
        try:
            yield self
        finally:
            self.rows = self.columns = self.valid = None

    def read(
        self, query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, scale: float | None, told: Mapping[str, Any]
    ) -> None:
        """`told`: what the block tells its backend beside query and key: the softcap, the window, the packing."""
        # While answering, later passes bring one new token each: the question was read in the first one.
        if self.rows is None or self.columns is None or query_BHLD.shape[2] != self.rows.shape[1]:
            return
        copies = query_BHLD.shape[0] // self.rows.shape[0]  # beams of a sample are alike while the question is read
        query, key = query_BHLD[::copies], key_BHLD[::copies]
        self.map = attention_map(
            query,
            key,
            self.rows,
            self.columns,
            attention_mask=self.valid,
            scale=scale,
            softcap=told.get("softcap"),
            window=told.get("sliding_window"),
            cu_seqlens=told.get("cu_seq_lens_q"),
            impl=self.impl,
        )


def attach(attention: nn.Module) -> Tap:
    """Put a tap on an attention module of a model loaded with `tapped_name(backend)`."""
    tap = Tap()
    setattr(attention, _ATTRIBUTE, tap)
    return tap


def tapped_name(backend: str) -> str:
    """Registers `backend` with taps and returns the name that transformers knows it by."""
    name = _NAMES[backend]

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tap = getattr(module, _ATTRIBUTE, None)
        if tap is not None:
            tap.read(query, key, scaling, kwargs)
        if backend != "sdpa":
            kwargs.pop("sample_lengths", None)
        return _backend(backend, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register(name, forward)
    mask = packing.sdpa_mask if backend == "sdpa" else ALL_MASK_ATTENTION_FUNCTIONS[backend]
    AttentionMaskInterface.register(name, mask)
    return name


def _backend(backend: str, module: nn.Module) -> Any:
    if backend == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return packing.sdpa if backend == "sdpa" else _flash_attention


def _flash_attention(
    module: Any,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' own wrapper calls; that takes the name of the package from the model, where ours stands."""
    query_BLHD, key_BLHD, value_BLHD = (t.transpose(1, 2) for t in (query_BHLD, key_BHLD, value_BHLD))
    mixed_BLHD = _flash_attention_forward(
        query_BLHD,
        key_BLHD,
        value_BLHD,
        attention_mask,
        query_length=query_BLHD.shape[1],
        is_causal=kwargs.pop("is_causal", None) or module.is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        use_top_left_mask=flash_attn_supports_top_left_mask(),
        attn_implementation="flash_attention_2",
        **kwargs,
    )
    return mixed_BLHD, None
