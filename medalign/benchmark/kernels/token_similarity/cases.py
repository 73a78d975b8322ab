"""The benchmark case of token similarity: cost models, problems to measure, entries to tune."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from medalign.benchmark.kernels import eager
from medalign.benchmark.kernels.case import Cost, CostModel, KernelCase, Problem, TuningEntry
from medalign.benchmark.kernels.token_similarity.binaries import binaries
from medalign.kernels import gpu
from medalign.kernels.tile_files import write_entry
from medalign.kernels.token_similarity import chunked, tile_table, token_similarity, triton, triton_launches
from medalign.kernels.token_similarity.tile_table import FEW, ODD, SINGLE, Tile

TOKENS = (576, 1024, 2304, 4096, 16384)  # a LLaVA image, and tiled images
SMALL_TOKENS = (64, 150)  # on the CPU, where the kernels are interpreted
WIDTHS, SMALL_WIDTHS = (4096, 1024), (96, 40)  # student, teacher


def cost_models() -> Iterator[CostModel]:
    """Yield the cost of each problem that is measured on a GPU."""
    for tokens in TOKENS:
        samples, (width, teacher_width) = samples_of(tokens), WIDTHS
        shape = samples, tokens, width, teacher_width
        costs = {"least": least_cost(*shape), "eager": eager_cost(*shape), "triton": triton_cost(*shape)}
        yield CostModel(f"B={samples} N={tokens} d={width} b={teacher_width} bf16", costs)


def samples_of(tokens: int) -> int:
    """Return the number of samples of a problem, which decreases for large images."""
    return 4 if tokens <= 2304 else 1


def least_cost(samples: int, tokens: int, width: int, teacher_width: int, size: int = 2) -> Cost:
    """D's upper half, and D times the features; features read once, the gradient written once."""
    operations = tokens**2 * (3 * width + teacher_width)
    return Cost(samples * operations, samples * tokens * (2 * width + teacher_width) * size)


def eager_cost(samples: int, tokens: int, width: int, teacher_width: int, size: int = 2) -> Cost:
    """Each operation of autograd on the eager form separately, reading its operands and writing its result.

    N x N: both similarities written (2), their difference (3), its square (2), the mean (1); backward: gradient of the
    mean (1) and of the square (3), read by the gradients of the product's two factors (2). N x d: norm and division (3,
    also for the teacher), factors read by the similarity (2, also for the teacher); backward: two products write and
    read (4), their sum (3), through the normalization (6).
    """
    operations = 2 * tokens**2 * (3 * width + teacher_width)
    elements = 14 * tokens**2 + tokens * (18 * width + 5 * teacher_width)
    return Cost(samples * operations, samples * elements * size)


def triton_cost(samples: int, tokens: int, width: int, teacher_width: int, size: int = 2) -> Cost:
    """Tiles as launched on sm_90, including padding, forward and backward.

    Bytes: `prepare` reads the features; each panel reads them for D and is written and read; the features are read
    again for the gradient and for the normalization; the gradient is written, then read and written by the backward
    pass. The L2 cache is assumed to hold the data that the tiles of a launch share.
    """
    tile = tile_table.differences("sm_90", (torch.bfloat16, torch.bfloat16), True, tokens, samples)
    count, height = triton_launches.panels(tokens)
    rows, columns = height // tile.rows, count * height // tile.columns
    tiles = count * (rows * columns - rows * (rows - 1) // 2)
    operations = 2 * tiles * tile.rows * tile.columns * (width + teacher_width)
    operations += 2 * (count * height) * tokens * width
    features = tokens * (width + teacher_width)
    elements = features + count * (features + 2 * height * count * height + tokens * width) + 4 * tokens * width
    return Cost(samples * operations, samples * elements * size)


def problems(device: torch.device, dtype: torch.dtype, tokens: Sequence[int] | None) -> Iterator[Problem]:
    """Yield one problem per number of tokens; None for the device's default numbers."""
    on_gpu = device.type == "cuda"
    for each in tokens or (TOKENS if on_gpu else SMALL_TOKENS):
        yield problem(device, dtype, each, *(WIDTHS if on_gpu else SMALL_WIDTHS))


def problem(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, teacher_width: int, samples: int | None = None
) -> Problem:
    """Random features of one size; the number of samples defaults to `samples_of(tokens)`."""
    samples = samples_of(tokens) if samples is None else samples
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=device)
    student = make(samples, tokens, width).to(dtype).requires_grad_()
    teacher = make(samples, tokens, teacher_width).to(dtype)
    upstream = torch.linspace(0.5, 2, samples, device=device)
    compiled = torch.compile(eager.token_similarity, fullgraph=True)
    paths = {
        "eager": lambda: eager.token_similarity(student, teacher),
        "torch.compile": lambda: compiled(student, teacher),
        "chunked": lambda: token_similarity(student, teacher, impl="chunked"),
    }
    if triton.available(device, dtype, dtype) is None:
        paths["triton"] = lambda: token_similarity(student, teacher, impl="triton")
    name = f"B={samples} N={tokens} d={width} b={teacher_width} {str(dtype).removeprefix('torch.')}"
    expected = functools.partial(_exact, student, teacher, upstream)
    return Problem(name, (student,), paths, upstream, expected, *_tolerances(dtype))


def _exact(student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The chunked implementation in float64, which needs no N x N matrix and is tested against the reference."""
    wide = student.detach().double().requires_grad_()
    value = chunked.token_similarity(wide, teacher.double(), None, None)
    return value.detach(), *torch.autograd.grad(value, wide, upstream.double())


def _tolerances(dtype: torch.dtype) -> tuple[tuple[float, float], str]:
    if dtype == torch.float32:
        return (1e-5, 1e-4), "sums of thousands of float32 terms, of cosines ten times their difference"
    rounding = torch.finfo(dtype).eps
    why = f"D, the gradient and its product with the upstream one are each rounded to {dtype}, {rounding / 2:.0e}"
    return (1e-4, 3 * rounding), why


def tuning_entries(device: torch.device) -> Iterator[TuningEntry]:
    """The entries for the device's architecture, each with a problem that uses it."""
    architecture = gpu.architecture(device)
    on_gpu = device.type == "cuda"
    wide, few = (2304, 576) if on_gpu else (64, 64)
    width, teacher_width = WIDTHS if on_gpu else SMALL_WIDTHS
    table = tile_table.table()[architecture]
    for kernel, kind in ((kernel, kind) for kernel, kinds in table.items() for kind in kinds):
        dtype = torch.float32 if kind.startswith(SINGLE) or not on_gpu else torch.bfloat16
        tokens, odd = (few if kind == FEW else wide), int("odd" in kind)
        solved = problem(device, dtype, tokens, width - odd, teacher_width - odd)
        place = architecture, kernel, kind
        yield TuningEntry(
            name=" / ".join(place),
            problem=solved.name,
            current=table[kernel][kind]._asdict(),
            candidates=_candidates(architecture, kernel, kind, few=not on_gpu),
            use=functools.partial(_use, place),
            step=functools.partial(_step, solved),
            table=tile_table.TABLE,
            write=functools.partial(write_entry, place),
        )


def _step(solved: Problem) -> None:
    torch.autograd.grad(solved.paths["triton"](), solved.leaves, solved.upstream)


def _candidates(architecture: str, kernel: str, kind: str, few: bool) -> Sequence[Mapping[str, Any]]:
    """Tiles whose sides divide the grain and whose operands fit; square where mirror images are written."""
    sides = (64,) if kind in (FEW, ODD) else (32, 64) if kind.startswith(SINGLE) else (64, 128)
    size = 4 if kind.startswith(SINGLE) else 2
    tiles = (
        Tile(rows, columns, depth, warps, stages)
        for rows, columns, depth, warps, stages in itertools.product(sides, sides, (32, 64), (4, 8), (2, 3, 4))
        if rows == columns or kernel != "differences"
    )
    limit = gpu.ARCHITECTURES[architecture].shared_memory
    fitting = [tile._asdict() for tile in tiles if tile.shared_memory(size) <= limit]
    return fitting[:2] if few else fitting


def _use(place: tuple[str, str, str], candidate: Mapping[str, Any]) -> None:
    architecture, kernel, kind = place
    tile_table.table()[architecture][kernel][kind] = Tile(**candidate)


CASE = KernelCase("token_similarity", binaries, cost_models, problems, tuning_entries)
