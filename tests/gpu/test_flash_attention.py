"""flash-attention with the attention capture, padded and packed, if the package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.student.loading import load_student
from medalign.student.model import Student, check_causality
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def load(cuda, student_folder):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed (pip install flash-attn --no-build-isolation)")

    def student(attention: str) -> Student:
        config = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4, alpha=8), attention=attention)
        return load_student(config, torch.bfloat16).to(cuda)

    return student


@pytest.mark.parametrize("form", ["even", "padded", "left", "packed"])
def test_the_student_is_the_one_with_sdpa(cuda, load, form):
    """Both round to bf16 after every product, 2^-8, in another order, about 12 times in each of 3 blocks."""
    texts = ((5, 4), (7, 2)) if form == "even" else ((5, 4), (9, 2))
    batch = tiny.batch(texts=texts, side="left" if form == "left" else "right")
    batch = (tiny.packed(batch) if form == "packed" else batch).to(cuda)
    found, expected = load("flash_attention_2")(batch), load("sdpa")(batch)
    valid = batch.attention_mask[:, expected.kept]
    for one, other in (
        (found.logits[valid], expected.logits[valid]),
        (found.tokens, expected.tokens),
        (found.attention, expected.attention),
    ):
        assert (one.float() - other.float()).norm() <= 36**0.5 * 2**-8 * other.float().norm()


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_gradients_are_those_of_sdpa(cuda, load, form):
    batch = tiny.batch()
    batch = (tiny.packed(batch) if form == "packed" else batch).to(cuda)
    gradients = []
    for attention in ("flash_attention_2", "sdpa"):
        student = load(attention).train()
        output = student(batch)
        valid = batch.attention_mask[:, output.kept]
        loss = output.logits[valid].float().square().mean() + output.attention.square().sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in student.parameters() if p.grad is not None]))
    one, other = gradients
    assert other.norm() > 0
    # The backward pass has as many roundings again, and gradients of opposite signs cancel.
    assert (one - other).norm() <= 2 * 72**0.5 * 2**-8 * other.norm()


def test_it_is_causal(cuda, load):
    check_causality(load("flash_attention_2"), tiny.batch().to(cuda))
    check_causality(load("flash_attention_2"), tiny.packed(tiny.batch()).to(cuda))
