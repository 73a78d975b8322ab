"""Every binary of the attention map's kernels that can be launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from medalign.benchmark.kernels.case import Binary
from medalign.kernels.attention_map import tile_table

KERNELS = ("log_sum_kernel", "column_kernel", "query_gradient_kernel", "key_gradient_kernel")
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BYTES = ("valid", "columns")
_PLACES = ("row_token", "row_first", "segment_first", "tile_segment", "tile_first")
_FLOATS = ("log_sum", "share", "partial", "upstream", "factor", "inner")


def binaries(architecture: str) -> Iterator[Binary]:
    """Every tile in its most demanding form (full width, with a softcap), and examples of the other variants.

    Narrower heads, other group sizes and scores without a cap change constants, not tiles. The float32 tiles are
    smaller than the 64 rows that the instructions of newer GPUs require, so they use `mma.sync`, which every GPU has.
    """
    for width in tile_table.WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            yield from (_binary(architecture, kernel, dtype, width) for kernel in KERNELS)
    for kernel in KERNELS:
        yield _binary(architecture, kernel, torch.float16, 128)
        yield _binary(architecture, kernel, torch.bfloat16, 80, capped=False)
    yield _binary(architecture, "query_gradient_kernel", torch.bfloat16, 128, wanted=False)


def _binary(
    architecture: str, kernel: str, dtype: torch.dtype, width: int, capped: bool = True, wanted: bool = True
) -> Binary:
    from medalign.kernels.attention_map import triton, triton_kernels

    function = getattr(triton_kernels, kernel)
    tiles = tile_table.tiles(architecture, dtype, width)
    constants: dict[str, Any] = triton.constants(tiles, dtype, width, group=4, capped=capped)
    if "WANTED" in function.arg_names:
        constants["WANTED"] = wanted
    types = dict.fromkeys(_BYTES, "*u8") | dict.fromkeys(_PLACES, "*i32") | dict.fromkeys(_FLOATS, "*fp32")
    types |= dict.fromkeys(("query", "key", "gradient"), f"*{_NAMES[dtype]}") | {"scale": "fp32", "softcap": "fp32"}
    used = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    divisible = tuple(name for name in used if name in types and types[name].startswith("*") or "_by_" in name)
    parts = (_NAMES[dtype], str(width), "softcap" if capped else "", "" if wanted else "inner sums only")
    name = f"{kernel.removesuffix('_kernel')} {' '.join(part for part in parts if part)}"
    newest = dtype != torch.float32
    return Binary(name, function, used, constants, tiles.warps, tiles.stages, divisible, tensor_cores=newest)
