"""The benchmark case of the attention map: cost models, problems to measure, entries to tune."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from medalign.benchmark.kernels import eager
from medalign.benchmark.kernels.attention_map.binaries import binaries
from medalign.benchmark.kernels.case import Cost, CostModel, KernelCase, Problem, TuningEntry
from medalign.kernels import gpu
from medalign.kernels.attention_map import attention_map, chunked, tile_table
from medalign.kernels.attention_map.arguments import AttentionMapArgs
from medalign.kernels.attention_map.tile_table import Tiles
from medalign.kernels.tile_files import write_entry

TOKENS = (576, 1024, 2304, 4096, 16384)  # per image
SMALL_TOKENS = (40, 70)  # on the CPU, where the kernels are interpreted


class Shape(NamedTuple):
    """A prompt: text, the image, the question (the rows), the answer; heads of `width` channels."""

    image: int
    question: int
    others: int
    heads: int
    key_heads: int
    width: int

    @property
    def length(self) -> int:
        """Number of tokens of the prompt."""
        return self.image + self.question + self.others

    def __str__(self) -> str:
        return f"L={self.length} N={self.image} R={self.question} heads={self.heads}/{self.key_heads} d={self.width}"


def shape_of(image: int, on_gpu: bool) -> Shape:
    """Return the shape of the prompt for a number of image tokens; smaller in all other sizes on the CPU."""
    return Shape(image, 40, 152, 32, 8, 128) if on_gpu else Shape(image, 5, 11, 4, 2, 16)


def cost_models() -> Iterator[CostModel]:
    """Yield the cost of each problem that is measured on a GPU."""
    for tokens in TOKENS:
        shape = shape_of(tokens, on_gpu=True)
        costs = {"least": least_cost(shape), "eager": eager_cost(shape), "triton": triton_cost(shape)}
        yield CostModel(f"B=1 {shape} bf16", costs)


def least_cost(shape: Shape, size: int = 2) -> Cost:
    """Scores, dQ and dK once each; the queries of the rows and the keys read once, both whole gradients written."""
    pairs = shape.heads * shape.question
    elements = (pairs + shape.key_heads * shape.length) + (shape.heads + shape.key_heads) * shape.length
    return Cost(6 * pairs * shape.length * shape.width, elements * shape.width * size)


def eager_cost(shape: Shape, size: int = 2) -> Cost:
    """Each operation of autograd on the eager form separately, for all L rows of every head.

    L x L, in elements of half precision: scores written (1), scaled (2), masked (2), softmax in float32 (3), rows
    selected in float32 (4), summed (2); backward, in float32 up to the softmax: sum (2), selection (4), softmax (6),
    then mask (2), scale (2), read by two products (2). L x d: keys repeated (3), read by the scores (2) and by their
    gradients (2), whose results are written and summed over the group (4).
    """
    elements = shape.heads * (32 * shape.length**2 + 11 * shape.length * shape.width)
    return Cost(6 * shape.heads * shape.length**2 * shape.width, elements * size)


def triton_cost(shape: Shape, size: int = 2) -> Cost:
    """Scores over L and over the columns; scores, scores and dQ, scores and dK. Each kernel reads its operands once.

    The gradients are first filled with zeros; then the rows of dQ and all of dK are written. In addition, two numbers
    per pair and one per key and key head are written.
    """
    pairs, keys = shape.heads * shape.question, shape.key_heads * shape.length
    products = (shape.length + shape.image) + 5 * shape.length
    read = 4 * (pairs + keys)
    written = (shape.heads + shape.key_heads) * shape.length + pairs + keys
    numbers = 4 * (6 * pairs + 2 * keys)
    return Cost(2 * pairs * products * shape.width, (read + written) * shape.width * size + numbers)


def problems(device: torch.device, dtype: torch.dtype, tokens: Sequence[int] | None) -> Iterator[Problem]:
    """Yield one problem per number of image tokens; None for the device's default numbers."""
    on_gpu = device.type == "cuda"
    for each in tokens or (TOKENS if on_gpu else SMALL_TOKENS):
        yield problem(device, dtype, shape_of(each, on_gpu))


def problem(device: torch.device, dtype: torch.dtype, shape: Shape) -> Problem:
    """Build random queries and keys of a shape, with the paths that can run on them."""
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=device)
    query = make(1, shape.heads, shape.length, shape.width).to(dtype).requires_grad_()
    key = make(1, shape.key_heads, shape.length, shape.width).to(dtype).requires_grad_()
    place_L = torch.arange(shape.length, device=device)[None]
    first = shape.others // 2
    columns = (place_L >= first) & (place_L < first + shape.image)
    rows = (place_L >= first + shape.image) & (place_L < first + shape.image + shape.question)
    upstream = make(1, shape.length)
    compiled = torch.compile(eager.attention_map)
    paths = {
        "eager": lambda: eager.attention_map(query, key, rows, columns),
        "torch.compile": lambda: compiled(query, key, rows, columns),
        "chunked": lambda: attention_map(query, key, rows, columns, impl="chunked"),
    }
    if gpu.refusal(device, dtype) is None:
        paths["triton"] = lambda: attention_map(query, key, rows, columns, impl="triton")
    name = f"B=1 {shape} {str(dtype).removeprefix('torch.')}"
    expected = functools.partial(_exact, query, key, rows, columns, upstream)
    return Problem(name, (query, key), paths, upstream, expected, *_tolerances(dtype))


def _exact(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The chunked implementation in float64, which needs no L x L matrix and is tested against the reference."""
    wide_query, wide_key = (tensor.detach().double().requires_grad_() for tensor in (query, key))
    args = AttentionMapArgs(rows, columns, torch.ones_like(rows), query.shape[-1] ** -0.5)
    value = chunked.attention_map(wide_query, wide_key, args)
    return value.detach(), *torch.autograd.grad(value, (wide_query, wide_key), upstream.double())


def _tolerances(dtype: torch.dtype) -> tuple[tuple[float, float], str]:
    if dtype == torch.float32:
        return (1e-5, 1e-4), "sums of thousands of float32 terms"
    rounding = torch.finfo(dtype).eps
    why = (
        f"score gradients and the result are each rounded to {dtype}, {rounding / 2:.0e}; scores are summed in float32"
    )
    return (1e-4, 2 * rounding), why


def tuning_entries(device: torch.device) -> Iterator[TuningEntry]:
    """The entries for the device's architecture, each with a problem that uses it."""
    architecture, on_gpu = gpu.architecture(device), device.type == "cuda"
    for kind in tile_table.table()[architecture]:
        precision, width, _ = kind.replace(",", "").split()
        dtype = torch.float32 if precision == "single" or not on_gpu else torch.bfloat16
        shape = shape_of(2304 if on_gpu else 20, on_gpu)._replace(width=int(width))
        solved = problem(device, dtype, shape)
        place = architecture, kind
        candidates = [tiles._asdict() for tiles in _candidates(precision, int(width))]
        yield TuningEntry(
            name=" / ".join(place),
            problem=solved.name,
            current=tile_table.table()[architecture][kind]._asdict(),
            candidates=candidates if on_gpu else candidates[:2],
            use=functools.partial(_use, place),
            step=functools.partial(_step, solved),
            table=tile_table.TABLE,
            write=functools.partial(write_entry, place),
        )


def _step(solved: Problem) -> None:
    torch.autograd.grad(solved.paths["triton"](), solved.leaves, solved.upstream)


def _candidates(precision: str, width: int) -> list[Tiles]:
    single = precision == "single"
    return [
        Tiles(pairs, keys, 32 if single else width, warps, stages)
        for pairs in ((16, 32) if single else (64, 128))
        for keys in ((16, 32) if single else (32, 64, 128))
        for warps in (4, 8)
        for stages in ((1, 2) if single else (2, 3))
    ]


def _use(place: tuple[str, str], candidate: Mapping[str, Any]) -> None:
    architecture, kind = place
    tile_table.table()[architecture][kind] = Tiles(**candidate)


CASE = KernelCase("attention_map", binaries, cost_models, problems, tuning_entries)
