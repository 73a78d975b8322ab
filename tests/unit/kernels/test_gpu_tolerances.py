"""The tolerances of the GPU tests: three TF32 products pass, a single one does not."""

from __future__ import annotations

import pytest
import torch

from medalign.kernels.token_similarity.reference import cosines
from tests.gpu import tolerances
from tests.gpu.test_attention_map import solve as solve_attention
from tests.gpu.test_token_similarity import error, solve
from tests.unit.kernels.test_attention_map import inputs


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits after the leading one."""
    single = tensor.detach().float().contiguous()
    return ((single.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def three(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the high and the low part, which has 21 bits."""
    high = tf32(tensor)
    return high + tf32(tensor.detach().double() - high)


@pytest.mark.parametrize(("tokens", "width", "teacher_width"), [(70, 48, 32), (100, 1024, 512)])
def test_token_similarity(tokens, width, teacher_width):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, tokens, width, generator=generator).double()
    teacher = torch.randn(2, tokens, teacher_width, generator=generator).double()
    valid, upstream = torch.ones(2, tokens, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    difference = float((cosines(student, valid) - cosines(teacher, valid)).square().mean().sqrt())
    _, limit = tolerances.similarity(torch.float32, torch.float32, (width, teacher_width), difference)
    _, wanted = solve("reference", student, teacher, None, None, upstream)
    for rounded, passes in ((three, True), (tf32, False)):
        _, found = solve("reference", rounded(student), rounded(teacher), None, None, upstream)
        assert (error(found, wanted) <= limit) == passes


@pytest.mark.parametrize("width", [16, 128])
def test_attention_map(width):
    tensors, rows, columns, valid = inputs(60, 4, 2, width)
    exact = tuple(tensor.detach().float().double().requires_grad_() for tensor in tensors)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"attention_mask": valid}
    wanted = solve_attention("reference", exact, rows, columns, upstream, **settings)
    _, limit = tolerances.attention(torch.float32, width)
    for rounded, passes in ((three, True), (tf32, False)):
        near = tuple(rounded(tensor).requires_grad_() for tensor in exact)
        found = solve_attention("reference", near, rows, columns, upstream, **settings)
        errors = [error(one, other) for one, other in zip(found[1:], wanted[1:], strict=True)]
        assert (max(errors) <= limit) == passes, errors


def test_tolerances_of_half_precision_allow_only_rounding():
    """The tolerance is far below the error of a wrong factor or term, and above the rounding errors."""
    for dtype in (torch.bfloat16, torch.float16):
        unit = tolerances.roundoff(dtype)
        assert 3 * unit < tolerances.similarity(dtype, dtype, (4096, 1024), 0.035)[1] < 5 * unit
        assert 2 * unit < tolerances.attention(dtype, 128)[1] < 4 * unit
