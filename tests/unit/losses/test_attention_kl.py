"""The attention divergence in its three normalizations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.losses import attention_kl

NORMALIZATIONS = ("sum", "softmax", "official")


def maps(images=3, tokens=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.rand(images, tokens, generator=generator, dtype=dtype) for _ in range(2))
    return (student * 0.05).requires_grad_(), teacher


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradcheck_with_a_mask(normalize):
    student, teacher = maps()
    mask = torch.arange(11).repeat(3, 1) < torch.tensor([[11], [6], [0]])
    assert torch.autograd.gradcheck(lambda s: attention_kl(s, teacher, mask, normalize=normalize), student)


def test_against_torch():
    student, teacher = maps()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=teacher), torch.distributions.Categorical(probs=student)
    )
    torch.testing.assert_close(attention_kl(student, teacher), expected)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    torch.testing.assert_close(attention_kl(student, teacher, normalize="softmax"), expected)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_masked_positions_have_no_effect(normalize):
    student, teacher = maps()
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[:, 2:9] = True
    short = attention_kl(student[:, 2:9], teacher[:, 2:9], normalize=normalize)
    spoiled = student.detach().masked_fill(~mask, float("nan")).requires_grad_()
    long = attention_kl(spoiled, teacher, mask, normalize=normalize)
    torch.testing.assert_close(long, short)
    long.sum().backward()
    assert spoiled.grad.isfinite().all() and (spoiled.grad[~mask] == 0).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("empty", ["student", "teacher", "mask"])
def test_no_mass_gives_zero_and_zero_gradient(normalize, empty):
    student, teacher = (tensor.detach().float() for tensor in maps())
    mask = torch.ones(3, 11, dtype=torch.bool)
    {"student": student, "teacher": teacher, "mask": mask}[empty][1] = 0
    student.requires_grad_()
    divergence = attention_kl(student, teacher, mask, normalize=normalize)
    divergence.sum().backward()
    assert divergence[1] == 0 and (student.grad[1] == 0).all()
    assert student.grad.isfinite().all() and (student.grad[[0, 2]] != 0).any(1).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_zeros_inside_a_map_stay_finite(normalize):
    student, teacher = (tensor.detach().float() for tensor in maps())
    student[0, 3] = teacher[0, 4] = 0
    student.requires_grad_()
    divergence = attention_kl(student, teacher, normalize=normalize)
    divergence.sum().backward()
    assert divergence.isfinite().all() and student.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 30), seed=st.integers(0, 2**16), factor=st.floats(0.01, 100))
def test_divergence_is_positive_and_depends_only_on_shares(tokens, seed, factor):
    student, teacher = maps(tokens=tokens, seed=seed)
    divergence = attention_kl(student, teacher)
    assert (divergence >= -1e-12).all()
    torch.testing.assert_close(attention_kl(student * factor, teacher), divergence)
    torch.testing.assert_close(attention_kl(teacher * factor, teacher), torch.zeros_like(divergence))
    assert (attention_kl(student, teacher, normalize="softmax") >= -1e-12).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"normalize": "l2"}, "sum, softmax, official"),
        ({"student_map": torch.ones(2, 5)}, "student_map"),
        ({"student_map": torch.ones(4), "teacher_map": torch.ones(4)}, "student_map"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask"),
    ],
)
def test_the_message_gives_the_invalid_argument(arguments, named):
    good = {"student_map": torch.ones(2, 4), "teacher_map": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=named):
        attention_kl(**(good | arguments))
