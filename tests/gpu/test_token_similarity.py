"""The compiled kernels of token similarity against the reference in float64 on the same inputs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from medalign.kernels import token_similarity
from medalign.kernels.token_similarity.reference import cosines
from tests.gpu import tolerances

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    samples: int
    tokens: int
    width: int
    teacher_width: int
    ragged: bool = False


REAL = {
    "llava": Case(4, 576, 4096, 1024),
    "ragged": Case(3, 575, 1024, 768, ragged=True),
    "odd width": Case(2, 100, 67, 33),
    "several panels": Case(1, 2304, 512, 512, ragged=True),
}
SMALL = {
    "llava": Case(2, 40, 64, 32),
    "ragged": Case(3, 70, 48, 32, ragged=True),
    "odd width": Case(2, 30, 37, 21),
    "several panels": Case(1, 130, 16, 16, ragged=True),
}


def inputs(case: Case, device: torch.device, student: torch.dtype, teacher: torch.dtype):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mask = weight = None
    if case.ragged:
        mask = torch.rand(case.samples, case.tokens, generator=generator, device=device) > 0.3
        mask[-1, case.tokens // 2 :] = False
        weight = torch.rand(case.samples, case.tokens, generator=generator, device=device) * 2
    features = draw(case.samples, case.tokens, case.width), draw(case.samples, case.tokens, case.teacher_width)
    return features[0].to(student), features[1].to(teacher), mask, weight


def solve(impl, student, teacher, mask, weight, upstream):
    student = student.detach().requires_grad_()
    loss = token_similarity(student, teacher, mask, weight, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, student, upstream.to(loss.dtype))[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - wanted).norm() / wanted.norm())


def check(student, teacher, mask, weight) -> None:
    wide = None if weight is None else weight.double()
    upstream = torch.linspace(0.5, 2, len(student), dtype=torch.float64, device=student.device)
    exact = student.double(), teacher.double(), mask, wide
    value, gradient = solve("reference", *exact, upstream)
    # Scaled as by a loss scaler to a gradient of about 1, which float16 can represent.
    scale = 2.0 ** -round(float(gradient.square().mean().sqrt().log2()))
    found = solve("triton", student, teacher, mask, weight, (upstream * scale).float())
    valid = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask
    difference = float((cosines(exact[0], valid) - cosines(exact[1], valid))[valid].square().mean().sqrt())
    widths = student.shape[2], teacher.shape[2]
    limits = tolerances.similarity(student.dtype, teacher.dtype, widths, difference)
    for name, one, other, limit in zip(("loss", "gradient"), found, (value, gradient * scale), limits, strict=True):
        assert error(one, other) <= limit, f"{name}: {error(one, other):.1e}, allowed {limit:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REAL)
def test_value_and_gradient(device, rehearsing, name, dtype):
    if rehearsing and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bf16")
    check(*inputs((SMALL if rehearsing else REAL)[name], device, dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_teacher_in_float32_as_in_training(device, rehearsing, dtype):
    if rehearsing and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bf16")
    check(*inputs((SMALL if rehearsing else REAL)["llava"], device, dtype, torch.float32))


def test_two_runs_are_equal_to_the_bit(device, rehearsing):
    dtype = torch.float16 if rehearsing else torch.bfloat16
    features = inputs((SMALL if rehearsing else REAL)["ragged"], device, dtype, dtype)
    upstream = torch.ones(3, device=device)
    first, second = (solve("triton", *features, upstream) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_auto_selects_the_kernels_on_a_gpu(cuda, caplog):
    from medalign.kernels import dispatch

    dispatch._announce.cache_clear()
    with caplog.at_level("INFO"):
        token_similarity(torch.randn(1, 9, 16, device=cuda), torch.randn(1, 9, 16, device=cuda))
    assert "token_similarity on cuda: triton" in caplog.text
