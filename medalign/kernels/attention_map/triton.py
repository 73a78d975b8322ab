"""The attention map on a GPU: Triton kernels for value and gradient, question rows alone, nothing L x L.

Counted before it was written, for F = H R pairs of query head and row, L keys of which N are columns, d channels,
e bytes an element; a product of two tiles costs 2 d operations an entry.

    value      two passes: log-sum-exp over L, then the columns               2 F d (L + N)
               one pass that keeps P of the columns and rescales it           2 F d L, and 4 F N bytes written, read
    gradient   inner = sum P g, then dQ, then dK (each forms the scores anew) 2 F d 5 L
               inner from sum P g K - inner sum P K                           2 F d 5 L, and cancels in half precision
               dQ and dK in one pass, dQ in partial sums a tile of keys       2 F d 4 L, and 8 F d L / 64 bytes
    bytes      Q rows and K, twice for the value, thrice for the gradient     e d (F + K L) a pass, mostly from L2

At 32 heads of 128, R = 40, L = 768, N = 576 that is 0.4 G operations for the value and 1.3 G for the gradient, where
the decoder block it hangs on takes 340 G forward: time is launches and latency, so the scheme with the fewest passes
over memory and no partial sums wins: two kernels forward, two backward (inner and dQ share one). Widths are padded to
a power of two, for the same reason. Each sum is formed by one program in a fixed order; no atomics.

A variant from Q, K and target straight to the KL was counted and left out: the normalisation needs the whole map, so
the pass over the columns must end before; it would save B L floats (12 kB) and no pass over Q or K.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from medalign.errors import KernelError
from medalign.kernels.attention_map.sight import Sight
from medalign.kernels.validation import describe

WIDEST = 256  # channels of a head: a tile of them is kept in registers
HEADROOM = 2.0**10  # of score gradients in half precision: they are at most twice this, and small shares stay normal


def attention_map(query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, sight: Sight) -> torch.Tensor:
    """See `medalign.kernels.attention_map`. Raises KernelError for heads wider than 256."""
    if query_BHLD.shape[-1] > WIDEST:
        raise KernelError(
            f'attention_map: impl="triton" takes heads of at most {WIDEST} channels, got query {describe(query_BHLD)}; '
            'choose impl="chunked"'
        )
    common = torch.promote_types(query_BHLD.dtype, key_BKLD.dtype)
    return _AttentionMap.apply(_by_channel(query_BHLD.to(common)), _by_channel(key_BKLD.to(common)), sight)


def _by_channel(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, sight: Sight) -> torch.Tensor:
        call = _Call(query_BHLD, key_BKLD, sight)
        log_sum_HT = query_BHLD.new_empty(call.heads, call.tokens, dtype=torch.float32)
        partial_KT = query_BHLD.new_zeros(call.key_heads, call.tokens, dtype=torch.float32)
        call.over_pairs("log_sum_kernel", log_sum=log_sum_HT)
        columns, share_S = sight.columns_BL.view(torch.uint8), call.share_S
        call.over_keys("column_kernel", log_sum=log_sum_HT, columns=columns, share=share_S, partial=partial_KT)
        ctx.save_for_backward(query_BHLD, key_BKLD, log_sum_HT)
        ctx.sight = sight
        return partial_KT.sum(0).view(columns.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_BL: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLD, key_BKLD, log_sum_HT = ctx.saved_tensors
        call = _Call(query_BHLD, key_BKLD, ctx.sight)
        upstream_BL = upstream_BL.float().masked_fill(~ctx.sight.columns_BL, 0)
        largest = upstream_BL.abs().amax()
        largest = torch.where(largest == 0, 1.0, largest)
        shared = {
            "log_sum": log_sum_HT,
            "inner": torch.empty_like(log_sum_HT),
            "upstream": upstream_BL.div_(largest).mul_(HEADROOM),
            "factor": call.share_S * (ctx.sight.scale * largest / HEADROOM),
        }
        wanted = ctx.needs_input_grad[0]
        query_gradient = torch.zeros_like(query_BHLD) if wanted else query_BHLD  # else not written
        call.over_pairs("query_gradient_kernel", **shared, **_gradient(query_gradient), WANTED=wanted)
        if not ctx.needs_input_grad[1]:
            return query_gradient, None, None
        key_gradient = torch.zeros_like(key_BKLD)
        call.over_keys("key_gradient_kernel", **shared, **_gradient(key_gradient))
        return query_gradient if wanted else None, key_gradient, None


def _gradient(tensor: torch.Tensor) -> dict[str, Any]:
    return {"gradient": tensor} | _strides("gradient", tensor)


def _strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """A kernel's names for the strides of a tensor [B, H, L, d]."""
    return dict(zip((f"{name}_by_sample", f"{name}_by_head", f"{name}_by_token"), tensor.stride(), strict=False))


class _Call:
    """What every launch for the same query, key and sight has in common. Never waits for the device.

    Tiles lie within a segment; how many there are is known on the device alone. So a grid is as large as it could
    have to be, and a table names the segment of each tile: programs that find none leave at once.
    """

    def __init__(self, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, sight: Sight) -> None:
        self.heads, self.key_heads, self.tokens = query_BHLD.shape[1], key_BKLD.shape[1], sight.rows_BL.numel()
        self.group = self.heads // self.key_heads
        self.bounds_S = sight.bounds()
        self.share_S, self.before_S = sight.shares(self.heads)
        self.block_width = max(16, 1 << (query_BHLD.shape[-1] - 1).bit_length())
        self.blocks = configuration(query_BHLD.dtype, self.block_width)
        self.device = query_BHLD.device
        self.common: dict[str, Any] = {
            "query": query_BHLD,
            "key": key_BKLD,
            "valid": sight.valid_BL.contiguous().view(torch.uint8),
            "row_token": sight.rows_BL.flatten().byte().argsort(descending=True, stable=True).int(),
            "row_first": self.before_S.int(),
            "segment_first": self.bounds_S.int(),
            **_strides("query", query_BHLD),
            **_strides("key", key_BKLD),
            "length": query_BHLD.shape[2],
            "tokens": self.tokens,
            "segments": len(self.bounds_S) - 1,
            "window": min(sight.window or self.tokens, self.tokens),
            "scale": float(sight.scale),
            "softcap": float(sight.softcap or 1.0),
            "GROUP": self.group,
            "WIDTH": query_BHLD.shape[-1],
            "CAPPED": sight.softcap is not None,
            "PRECISION": "tf32x3" if query_BHLD.dtype == torch.float32 else "ieee",
            "BLOCK_D": self.block_width,
        }

    def over_pairs(self, kernel: str, **arguments: Any) -> None:
        """Launch a kernel over tiles of (row, query head) pairs."""
        pairs_S = self.before_S.diff() * self.group
        self._launch(kernel, pairs_S, self.tokens * self.group, self.blocks.pairs, arguments)

    def over_keys(self, kernel: str, **arguments: Any) -> None:
        """Launch a kernel over tiles of keys."""
        self._launch(kernel, self.bounds_S.diff(), self.tokens, self.blocks.keys, arguments)

    def _launch(self, kernel: str, items_S: torch.Tensor, most: int, block: int, arguments: dict[str, Any]) -> None:
        tiles_S = (items_S + block - 1) // block
        end_S = tiles_S.cumsum(0)
        bound = most // block + len(tiles_S)
        segment = torch.searchsorted(end_S, torch.arange(bound, device=self.device), right=True)
        _kernels()[kernel][(bound, self.key_heads)](
            **self.common,
            **arguments,
            tile_segment=segment.int(),
            tile_first=(end_S - tiles_S).int(),
            BLOCK_F=self.blocks.pairs,
            BLOCK_N=self.blocks.keys,
            CHUNK=self.blocks.channels,
            num_warps=self.blocks.warps,
            num_stages=self.blocks.stages,
        )


class Blocks(NamedTuple):
    """A fixed configuration: pairs and keys of a tile, warps of a program, stages of its loops' pipeline."""

    pairs: int
    keys: int
    warps: int
    stages: int
    channels: int  # of a head that a product of two tiles takes at a time


def configuration(dtype: torch.dtype, width: int) -> Blocks:
    """For heads padded to `width` channels.

    Half precision: 64 x 64 is the smallest tile that wgmma takes; eight warps keep the gradient of a wide tile in
    registers. Float32 is multiplied as three TF32 products, whose operands take six times the registers of a half's:
    small tiles, a few channels at a time.
    """
    if dtype == torch.float32:
        side = 16 if width > 128 else 32
        return Blocks(side, side, 4 if width <= 64 else 8, 1, min(width, 32))
    return Blocks(64, 64, 4 if width <= 64 else 8, 2, width)


@functools.cache
def _kernels() -> dict[str, Any]:
    """By name; loaded at the first use, since triton is not there on every machine and slow to import."""
    from medalign.kernels.attention_map import triton_kernels

    return vars(triton_kernels)
