"""The attention map on a GPU: Triton kernels for value and gradient, from question rows only, without L x L buffers.

Cost of the alternatives, for F = H R pairs of query head and row, L keys of which N are columns, d channels, and e
bytes per element; a product of two tiles costs 2 d operations per entry.

    value      two passes: log-sum-exp over L, then the columns               2 F d (L + N)
               one pass that keeps P of the columns and rescales it           2 F d L, and 4 F N bytes written, read
    gradient   inner = sum P g, then dQ, then dK (each recomputes the scores) 2 F d 5 L
               inner from sum P g K - inner sum P K                           2 F d 5 L, and cancels in half precision
               dQ and dK in one pass, dQ in partial sums per tile       2 F d 4 L, and 8 F d L / 64 bytes
    bytes      Q rows and K, twice for the value, thrice for the gradient     e d (F + K L) per pass, mostly from L2

With 32 heads of 128 channels, R = 40, L = 768 and N = 576, that is 0.4 G operations for the value and 1.3 G for the
gradient, while the decoder block takes 340 G in its forward pass. Launches and latency dominate, so the scheme with the
fewest passes over memory and no partial sums is used: two kernels forward and two backward (inner and dQ share one).
Widths are padded to a power of two for the same reason. One program computes each sum in a fixed order; there are no
atomics.

Fusing the KL loss into the kernel would save B L floats (12 kB) and no pass over Q or K: the normalization needs the
whole map, so the pass over the columns must end first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from medalign.errors import KernelError
from medalign.kernels import gpu
from medalign.kernels.attention_map import tile_table
from medalign.kernels.attention_map.arguments import AttentionMapArgs
from medalign.kernels.validation import describe

WIDEST = tile_table.WIDTHS[-1]  # channels per head: the gradients of a tile are kept in registers
BOUNDARY = 16  # alignment of vectors in elements, and of addresses in bytes, for wide loads and few binaries
HEADROOM = 2.0**10  # scale of score gradients in half precision: at most twice this, and small values stay normal


def attention_map(query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> torch.Tensor:
    """See `medalign.kernels.attention_map`. Raises KernelError for heads wider than 256."""
    if query_BHLD.shape[-1] > WIDEST:
        raise KernelError(
            f'attention_map: impl="triton" supports heads of at most {WIDEST} channels, '
            f'got query {describe(query_BHLD)}; choose impl="chunked"'
        )
    common = torch.promote_types(query_BHLD.dtype, key_BKLD.dtype)
    query_BHLD, key_BKLD = _by_channel(query_BHLD.to(common)), _by_channel(key_BKLD.to(common))
    map_BL: torch.Tensor = _AttentionMap.apply(query_BHLD, key_BKLD, args)
    return map_BL


def _by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous channels and aligned vectors; copied only if necessary."""
    steps = *tensor.stride()[:-1], tensor.data_ptr()
    if tensor.stride(-1) == 1 and not any(step % BOUNDARY for step in steps):
        return tensor
    return _like(tensor).copy_(tensor)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the same shape, with aligned vectors."""
    *shape, width = tensor.shape
    return tensor.new_zeros(*shape, -(-width // BOUNDARY) * BOUNDARY)[..., :width]


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> torch.Tensor:
        call = _Call(query_BHLD, key_BKLD, args)
        log_sum_HT = query_BHLD.new_empty(call.heads, call.tokens, dtype=torch.float32)
        partial_KT = query_BHLD.new_zeros(call.key_heads, call.tokens, dtype=torch.float32)
        inputs = {"query": query_BHLD, "key": key_BKLD, "log_sum": log_sum_HT}
        call.over_pairs("log_sum_kernel", **inputs)
        columns = args.columns_BL.view(torch.uint8)
        call.over_keys("column_kernel", **inputs, columns=columns, share=call.share_S, partial=partial_KT)
        ctx.save_for_backward(query_BHLD, key_BKLD, log_sum_HT)
        ctx.args, ctx.call = args, call
        return partial_KT.sum(0).view(columns.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_BL: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLD, key_BKLD, log_sum_HT = ctx.saved_tensors
        call = ctx.call
        upstream_BL = upstream_BL.float().contiguous().masked_fill(~ctx.args.columns_BL, 0)
        largest = upstream_BL.abs().amax()
        largest = torch.where(largest == 0, 1.0, largest)
        shared = {
            "query": query_BHLD,
            "key": key_BKLD,
            "log_sum": log_sum_HT,
            "inner": torch.empty_like(log_sum_HT),
            "upstream": upstream_BL.div_(largest).mul_(HEADROOM),
            "factor": call.share_S * (ctx.args.scale * largest / HEADROOM),
        }
        wanted = ctx.needs_input_grad[0]
        query_gradient = _like(query_BHLD) if wanted else query_BHLD  # else not written
        call.over_pairs("query_gradient_kernel", **shared, **_gradient(query_gradient), WANTED=wanted)
        if not ctx.needs_input_grad[1]:
            return query_gradient, None, None
        key_gradient = _like(key_BKLD)
        call.over_keys("key_gradient_kernel", **shared, **_gradient(key_gradient))
        return query_gradient if wanted else None, key_gradient, None


def _gradient(tensor: torch.Tensor) -> dict[str, Any]:
    return {"gradient": tensor} | _strides("gradient", tensor)


def _strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """A kernel's names for the strides of a tensor [B, H, L, d]."""
    return dict(zip((f"{name}_by_sample", f"{name}_by_head", f"{name}_by_token"), tensor.stride(), strict=False))


class _Call:
    """The arguments common to all launches for one query, key and args. Never waits for the device.

    Tiles lie within a segment, and their number is known only on the device. The grid therefore has the maximum size,
    and a table maps each tile to its segment; programs without a segment return at once. Forward and backward pass
    share the tables, and query and key are not kept: at these sizes, the host takes longer than the device.
    """

    def __init__(self, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, args: AttentionMapArgs) -> None:
        self.heads, self.key_heads, self.tokens = query_BHLD.shape[1], key_BKLD.shape[1], args.rows_BL.numel()
        group = self.heads // self.key_heads
        bounds_S = args.bounds()
        self.share_S, before_S = args.shares(self.heads)
        self.device = query_BHLD.device
        width = query_BHLD.shape[-1]
        tiles = tile_table.tiles(gpu.architecture(self.device), query_BHLD.dtype, width)
        self.common: dict[str, Any] = {
            "valid": args.valid_BL.view(torch.uint8),
            "row_token": args.rows_BL.flatten().byte().argsort(descending=True, stable=True).int(),
            "row_first": before_S.int(),
            "segment_first": bounds_S.int(),
            **_strides("query", query_BHLD),
            **_strides("key", key_BKLD),
            "length": query_BHLD.shape[2],
            "tokens": self.tokens,
            "segments": len(bounds_S) - 1,
            "window": min(args.window or self.tokens, self.tokens),
            "scale": float(args.scale),
            "softcap": float(args.softcap or 1.0),
            **constants(tiles, query_BHLD.dtype, width, group, capped=args.softcap is not None),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }
        self._pair_tiles = self._tables(before_S.diff() * group, self.tokens * group, tiles.pairs)
        self._key_tiles = self._tables(bounds_S.diff(), self.tokens, tiles.keys)

    def over_pairs(self, kernel: str, **arguments: Any) -> None:
        """Launch a kernel over tiles of (row, query head) pairs."""
        self._launch(kernel, self._pair_tiles, arguments)

    def over_keys(self, kernel: str, **arguments: Any) -> None:
        """Launch a kernel over tiles of keys."""
        self._launch(kernel, self._key_tiles, arguments)

    def _tables(self, items_S: torch.Tensor, limit: int, block: int) -> dict[str, torch.Tensor]:
        """Return the segment of each tile and the first tile of each segment, for tiles of `block` items."""
        tiles_S = (items_S + block - 1) // block
        end_S = tiles_S.cumsum(0)
        bound = limit // block + len(tiles_S)
        segment = torch.searchsorted(end_S, torch.arange(bound, device=self.device), right=True)
        return {"tile_segment": segment.int(), "tile_first": (end_S - tiles_S).int()}

    def _launch(self, kernel: str, tables: dict[str, torch.Tensor], arguments: dict[str, Any]) -> None:
        kernels, grid = _kernels(), (len(tables["tile_segment"]), self.key_heads)
        try:
            with torch.cuda.device_of(arguments["query"]):
                kernels[kernel][grid](**self.common, **arguments, **tables)
        except kernels["OutOfResources"] as error:
            raise KernelError(
                f"attention_map: {self.device} lacks the resources for {kernel} at {self.common['WIDTH']} "
                f'channels per head ({error}); choose impl="chunked"'
            ) from error


def constants(tiles: tile_table.Tiles, dtype: torch.dtype, width: int, group: int, capped: bool) -> dict[str, Any]:
    """The compile-time constants of every kernel."""
    return {
        "GROUP": group,
        "WIDTH": width,
        "CAPPED": capped,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",  # three TF32 products keep float32's accuracy
        "BLOCK_D": tile_table.padded(width),
        "BLOCK_F": tiles.pairs,
        "BLOCK_N": tiles.keys,
        "CHUNK": tiles.channels,
    }


@functools.cache
def _kernels() -> dict[str, Any]:
    """The kernels by name; imported on first use, because Triton is slow to import and not installed everywhere."""
    from medalign.kernels.attention_map import triton_kernels

    return vars(triton_kernels)
