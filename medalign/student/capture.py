"""Capture of the question's attention at one decoder block, without materializing the full attention matrix.

Every block keeps its fast attention backend. The functions that are registered with transformers here call that
backend to compute the block's output. At the tapped block, which carries an `AttentionCapture`, they also pass the
post-rotary query and key to `kernels.attention_map`, which computes only the question's rows. transformers looks up
both the attention function and the mask function by the name in `config._attn_implementation`. The mask function must
be registered too, otherwise the model would silently lose its causal mask (`check_causality` in `student.model`
verifies this).

A block that carries an intervention (`intervening`) computes its output in another way, which may still call the
backend. What is captured there is the attention before the intervention.

Shape suffixes: B samples, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask

from medalign.kernels import attention_map
from medalign.student import packing

# Names under which the backends are registered with transformers. transformers would look up a name that contains
# "flash" among its own kernels.
_NAMES = {"sdpa": "medalign_sdpa", "flash_attention_2": "medalign_fa2", "eager": "medalign_eager"}
ATTRIBUTE = "medalign_attention_capture"
_INTERVENTION = "medalign_attention_intervention"

Output = tuple[torch.Tensor, torch.Tensor | None]
"""What an attention function returns: the output [B, L, H, D], and the attention weights or None."""


class Intervention(Protocol):
    """Computes the output of an attention module in place of its backend."""

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        query_BHLD: torch.Tensor,
        key_BHLD: torch.Tensor,
        value_BHLD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **kwargs: Any,
    ) -> Output:
        """Return the output of the module.

        Args:
            attend: the backend, which takes all further arguments.
            module: the attention module.
            query_BHLD: post-rotary queries of this pass.
            key_BHLD: post-rotary keys, those in the cache included. They may have fewer heads than the queries.
            value_BHLD: values of the keys.
            attention_mask: in the form of the backend; None if it needs none.
            **kwargs: `scaling`, and further arguments of the backend such as the softcap.
        """


@dataclass
class AttentionCapture:
    """Inputs and result of the capture during one forward pass."""

    rows: torch.Tensor | None = None  # [B, L] bool; query positions to average over
    columns: torch.Tensor | None = None  # [B, L] bool; key positions to report
    valid: torch.Tensor | None = None  # [B, L] bool; False at padding
    attention: torch.Tensor | None = None  # [B, L] float32; set by the forward pass
    impl: str = "auto"

    @contextmanager
    def recording(self, rows: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> Iterator[AttentionCapture]:
        """Capture attention in the forward passes inside the context; `attention` remains available afterwards.

        Args:
            rows: [B, L] bool, query positions to average over.
            columns: [B, L] bool, key positions to report.
            valid: [B, L] bool, False at padding.
        """
        self.rows, self.columns, self.valid, self.attention = rows, columns, valid, None
        try:
            yield self
        finally:
            self.rows = self.columns = self.valid = None

    def capture(
        self, query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, scale: float | None, attention_kwargs: Mapping[str, Any]
    ) -> None:
        """Compute `attention` from the block's query and key.

        Args:
            query_BHLD: post-rotary queries.
            key_BHLD: post-rotary keys.
            scale: softmax scale; None for the default of the kernel.
            attention_kwargs: further arguments that the block passes to its backend, such as the softcap, the sliding
                window and the sequence boundaries of a packed batch.
        """
        # During generation, each later pass processes one new token; the question was processed in the first pass.
        if self.rows is None or self.columns is None or query_BHLD.shape[2] != self.rows.shape[1]:
            return
        copies = query_BHLD.shape[0] // self.rows.shape[0]  # all beams of a sample hold the same question
        query, key = query_BHLD[::copies], key_BHLD[::copies]
        self.attention = attention_map(
            query,
            key,
            self.rows,
            self.columns,
            attention_mask=self.valid,
            scale=scale,
            softcap=attention_kwargs.get("softcap"),
            window=attention_kwargs.get("sliding_window"),
            cu_seqlens=attention_kwargs.get("cu_seq_lens_q"),
            impl=self.impl,
        )


def attach_capture(attention: nn.Module) -> AttentionCapture:
    """Attach a capture to an attention module of a model that was loaded with `register_attention(backend)`."""
    capture = AttentionCapture()
    setattr(attention, ATTRIBUTE, capture)
    return capture


@contextmanager
def intervening(interventions: Mapping[nn.Module, Intervention]) -> Iterator[None]:
    """Inside the context, these attention modules compute their outputs by an intervention each.

    Args:
        interventions: attention modules of a model that was loaded with `register_attention`, without one so far.
    """
    for module, intervention in interventions.items():
        setattr(module, _INTERVENTION, intervention)
    try:
        yield
    finally:
        for module in interventions:
            delattr(module, _INTERVENTION)


def register_attention(backend: str) -> str:
    """Register `backend` with support for captures and interventions.

    Args:
        backend: "sdpa", "flash_attention_2" or "eager".

    Returns:
        The name to pass to transformers as the attention implementation.
    """
    name = _NAMES[backend]

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Output:
        capture: AttentionCapture | None = getattr(module, ATTRIBUTE, None)
        if capture is not None:
            capture.capture(query, key, scaling, kwargs)
        if backend != "sdpa":
            kwargs.pop("sample_lengths", None)
        attend = _backend(backend, module)
        if intervention := getattr(module, _INTERVENTION, None):
            attend = partial(intervention, attend)
        result: Output = attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return result

    AttentionInterface.register(name, forward)
    mask = packing.sdpa_mask if backend == "sdpa" else ALL_MASK_ATTENTION_FUNCTIONS[backend]
    AttentionMaskInterface.register(name, mask)
    return name


def _backend(backend: str, module: nn.Module) -> Any:
    if backend == "eager":  # every model file defines its own
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
    """Call flash-attention as the wrapper in transformers does.

    That wrapper reads the implementation's name from the model's configuration, which holds the name registered here.
    """
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
