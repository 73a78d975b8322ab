"""The compiled kernels of the attention map against the reference in float64 on the same inputs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from medalign.kernels import attention_map
from tests.gpu import tolerances
from tests.gpu.test_token_similarity import DTYPES, error
from tests.unit.kernels.test_attention_map import inputs, packed

pytestmark = pytest.mark.gpu


class Case(NamedTuple):
    length: int
    heads: int
    key_heads: int
    width: int


REAL = {
    "llava": Case(704, 32, 8, 128),
    "one key head": Case(300, 6, 1, 64),
    "width 80": Case(196, 4, 4, 80),
    "width 256": Case(260, 8, 4, 256),
}
SMALL = {
    "llava": Case(60, 4, 2, 16),
    "one key head": Case(40, 3, 1, 8),
    "width 80": Case(30, 2, 2, 80),
    "width 256": Case(30, 2, 1, 136),
}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "window": {"window": 37},
    "both": {"softcap": 5.0, "window": 37},
}

# Each option of the scores at the real shape. Other shapes have all options at once, since each compiles a binary.
CASES = [*(("llava", options) for options in OPTIONS), *((name, "both") for name in REAL if name != "llava")]


def make(case: Case, device: torch.device, dtype: torch.dtype, layout: str = "padded"):
    """Four samples: full, padded on the right, padded on the left, and without rows. The last value is the layout."""
    tensors, rows, columns, valid = inputs(*case)
    settings = {"attention_mask": valid}
    if layout == "packed":
        tensors, rows, columns, borders = packed(tensors, rows, columns, valid)
        settings = {"cu_seqlens": borders}
    placed = tuple(tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors)
    return placed, rows.to(device), columns.to(device), {name: value.to(device) for name, value in settings.items()}


def solve(impl, tensors, rows, columns, upstream, **settings):
    found = attention_map(*tensors, rows, columns, impl=impl, **settings)
    return found.detach(), *torch.autograd.grad(found, tensors, upstream.to(found.dtype))


def check(found, expected, scale: float, limits: tuple[float, float]) -> None:
    for name, one, other in zip(("map", "query gradient", "key gradient"), found, expected, strict=True):
        limit = limits[0] if name == "map" else limits[1]
        wrong = error(one, other * (1.0 if name == "map" else scale))
        assert wrong <= limit, f"{name}: {wrong:.1e}, allowed {limit:.1e}"


def unit(gradients) -> float:
    """Return a power of two that scales the smaller gradient to about 1, which float16 can represent."""
    return 2.0 ** -round(min(float(gradient.square().mean().sqrt().log2()) for gradient in gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_value_and_gradients(device, rehearsing, layout, name, dtype, options):
    if rehearsing and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bf16")
    case = (SMALL if rehearsing else REAL)[name]
    tensors, rows, columns, settings = make(case, device, dtype, layout)
    settings |= OPTIONS[options]
    upstream = torch.randn(rows.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = solve("reference", wide, rows, columns, upstream, **settings)
    scale = unit(expected[1:])
    found = solve("triton", tensors, rows, columns, upstream * scale, **settings)
    check(found, expected, scale, tolerances.attention(dtype, case.width, settings.get("softcap")))


def test_two_runs_are_equal_to_the_bit(device, rehearsing):
    dtype = torch.float16 if rehearsing else torch.bfloat16
    tensors, rows, columns, settings = make((SMALL if rehearsing else REAL)["llava"], device, dtype)
    upstream = torch.randn(rows.shape, device=device)
    first, second = (solve("triton", tensors, rows, columns, upstream, softcap=5.0, **settings) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_heads_in_the_memory_order_of_a_model(device, rehearsing):
    """Views of [B, L, H, d], as after the projection."""
    dtype = torch.float16 if rehearsing else torch.bfloat16
    tensors, rows, columns, settings = make((SMALL if rehearsing else REAL)["llava"], device, dtype)
    views = tuple(t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors)
    upstream = torch.randn(rows.shape, device=device)
    found, expected = (solve("triton", each, rows, columns, upstream, **settings) for each in (views, tensors))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
