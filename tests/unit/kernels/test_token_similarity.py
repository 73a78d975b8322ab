"""Token similarity: the chunked path against the specification, its invariances, its memory, its errors."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.errors import KernelError
from medalign.kernels import dispatch, token_similarity
from tests.unit.kernels.allocations import LargestTensor

IMPLEMENTATIONS = ("reference", "chunked")
# float64 against float64: only the order of summation differs.
EXACT = {"rtol": 1e-9, "atol": 1e-14}


def inputs(samples, tokens, width=13, teacher_width=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(samples, tokens, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(samples, tokens, teacher_width, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def value_and_gradient(impl, student, teacher, mask=None, weight=None):
    loss = token_similarity(student, teacher, mask, weight, impl=impl)
    upstream = torch.linspace(-1.5, 2, loss.shape[0], dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 17, 196, 575])
def test_chunked_is_the_reference(tokens, masked, weighted):
    student, teacher = inputs(3, tokens)
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(3, tokens, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[1] = False  # a sample without tokens
        mask[2, tokens // 2 :] = False  # a partly valid sample
    weight = torch.rand(3, tokens, generator=generator, dtype=torch.float64) if weighted else None
    expected = value_and_gradient("reference", student, teacher, mask, weight)
    found = value_and_gradient("chunked", student, teacher, mask, weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
        assert one.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_formula_by_hand(impl):
    """Two tokens: orthogonal for the student, at 60 degrees for the teacher; the pairs (0,1), (1,0) differ by 1/2."""
    student = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5]]])
    torch.testing.assert_close(token_similarity(student, teacher, impl=impl), torch.tensor([2 * 0.25 / 4]))
    weight = torch.tensor([[3.0, 5.0]])
    weighted = token_similarity(student, teacher, weight=weight, impl=impl)
    torch.testing.assert_close(weighted, torch.tensor([2 * 15 * 0.25 / 4]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_of_masked_tokens_do_not_matter(impl):
    student, teacher = inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    short = token_similarity(student[:, :6], teacher[:, :6], impl=impl)
    spoiled = student.detach().clone()
    spoiled[:, 6:] = float("nan")
    spoiled.requires_grad_()
    loss, gradient = value_and_gradient(impl, spoiled, teacher, mask)
    torch.testing.assert_close(loss, short.detach(), **EXACT)
    assert gradient[:, :6].isfinite().all() and (gradient[:, 6:] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_token_without_direction_gets_no_gradient(impl):
    student, teacher = inputs(1, 5)
    student = student.detach().clone()
    student[0, 2] = 0
    loss, gradient = value_and_gradient(impl, student.requires_grad_(), teacher)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert (gradient[0, 2] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype, impl):
    student, teacher = inputs(2, 70, dtype=dtype)
    wide = student.detach().double().requires_grad_()
    loss, gradient = value_and_gradient(impl, student, teacher)
    expected, expected_gradient = value_and_gradient("reference", wide, teacher.double())
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    # The inputs are the same numbers, so the loss has the precision of float32. The gradient is rounded once to its
    # own type, by at most half an epsilon of each element; the float32 sums before add 1e-5.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-8)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl):
    student, teacher = inputs(2, 40, dtype=torch.float32)
    plain = token_similarity(student, teacher, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_similarity(student, teacher, impl=impl), plain)


def test_teacher_and_weight_are_constants_and_no_grad_stores_nothing():
    student, teacher = inputs(2, 12)
    teacher.requires_grad_()
    weight = torch.ones(2, 12, dtype=torch.float64, requires_grad=True)
    for impl in IMPLEMENTATIONS:
        token_similarity(student, teacher, weight=weight, impl=impl).sum().backward()
        assert teacher.grad is None and weight.grad is None
        with torch.no_grad():
            assert token_similarity(student, teacher, impl=impl).grad_fn is None
    assert not token_similarity(student.detach(), teacher, impl="chunked").requires_grad


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 2**16), impl=st.sampled_from(IMPLEMENTATIONS))
def test_invariances(tokens, seed, impl):
    """To a rotation of the features, to the length of each token, and to the order of the tokens."""
    student, teacher = inputs(1, tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    loss = token_similarity(student, teacher, impl=impl)
    rotation = torch.linalg.qr(torch.randn(13, 13, generator=generator, dtype=torch.float64))[0]
    length = torch.rand(1, tokens, 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    order = torch.randperm(tokens, generator=generator)
    for other in (
        token_similarity(student @ rotation, teacher, impl=impl),
        token_similarity(student * length, teacher, impl=impl),
        token_similarity(student[:, order], teacher[:, order], impl=impl),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-12)
    assert 0 <= loss.item() <= 4


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(2, 30), seed=st.integers(0, 2**16))
def test_gradient_is_orthogonal_to_each_token(tokens, seed):
    student, teacher = inputs(1, tokens, seed=seed)
    _, gradient = value_and_gradient("chunked", student, teacher)
    assert (gradient * student).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("tokens", [64, 300, 1024])
def test_chunked_never_makes_a_square_matrix(tokens):
    student, teacher = inputs(1, tokens, width=4, teacher_width=3, dtype=torch.float32)
    with LargestTensor() as chunked:
        token_similarity(student, teacher, impl="chunked").sum().backward()
    with LargestTensor() as reference:
        token_similarity(student, teacher, impl="reference").sum().backward()
    assert reference.elements >= tokens**2
    assert chunked.elements <= max(tokens * 256, tokens * 4) and chunked.elements < tokens**2


def test_the_choice_is_logged_once_and_named_paths_are_kept(caplog):
    student, teacher = inputs(1, 4)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="medalign.kernels"):
        for _ in range(2):
            token_similarity(student, teacher)
            token_similarity(student, teacher, impl="reference")
    assert sum("chunked" in record.getMessage() for record in caplog.records) == 1
    assert sum("reference" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("impl", ["fast", ""])
def test_unknown_implementation(impl):
    student, teacher = inputs(1, 4)
    with pytest.raises(KernelError, match="auto, reference, chunked, triton"):
        token_similarity(student, teacher, impl=impl)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"student": torch.zeros(4, 5)}, "student"),
        ({"student": torch.zeros(2, 4, 5, dtype=torch.int64)}, "student"),
        ({"teacher": torch.zeros(2, 3, 5)}, r"teacher .*\(2, 3, 5\)"),
        ({"teacher": torch.zeros(1, 4, 5)}, "teacher"),
        ({"teacher": torch.zeros(2, 4, 5, device="meta")}, "teacher is on meta"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, "mask"),
        ({"mask": [[True]]}, "mask"),
        ({"weight": torch.ones(4)}, "weight"),
        ({"weight": torch.ones(2, 4, dtype=torch.int64)}, "weight"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    good = {"student": torch.zeros(2, 4, 5), "teacher": torch.zeros(2, 4, 3)}
    with pytest.raises(ValueError, match=named):
        token_similarity(**(good | arguments))
