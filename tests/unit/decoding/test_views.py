"""Several views of the prompts in one generation, where the rows of each keep what belongs to them."""

from __future__ import annotations

import pytest
import torch

from medalign.decoding.base import Decoding
from medalign.decoding.methods.avisc import AvisC
from tests import tiny
from tests.unit.decoding.test_opera import TEXTS, TOKENS, load


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("method", [AvisC(alpha=0.0, beta=0.0), AvisC(alpha=3.0, deviations=-1000.0)])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 2.0, "seed": 3}])
def test_views_that_change_nothing_give_the_answers_of_greedy_decoding(student_folder, mixture, method, settings):
    """With alpha 0 only the first view counts; where all tokens are blind, the second one equals it."""
    student = load(student_folder, "sdpa", query_mixture=mixture)
    batch, forward = tiny.batch(side="left", texts=TEXTS), student.spec.language_model.forward
    expected, attention = Decoding().method.generate(student, batch, Decoding(12, **settings), **TOKENS)
    found, captured = method.generate(student, batch, Decoding(12, method=method, **settings), **TOKENS)
    assert torch.equal(found, expected)
    torch.testing.assert_close(captured, attention, rtol=1e-5, atol=1e-7)  # sums of other batches have another order
    assert student.spec.language_model.forward == forward
