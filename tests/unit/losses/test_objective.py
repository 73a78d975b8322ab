"""The objective: the counts, the weights, and the inputs that each term reaches."""

from dataclasses import replace

import pytest
import torch

from medalign.config import LossConfig
from medalign.contracts import IGNORE, Batch, StudentOutput, TeacherTargets
from medalign.kernels import token_similarity
from medalign.losses import Objective, attention_kl, build_terms
from medalign.losses.token_similarity import attention_weights


def objective(alpha=1.0, beta=1.0, **settings):
    return Objective(build_terms(LossConfig(alpha=alpha, beta=beta, **settings)))


ONE = {"language": 1.0, "similarity": 1.0, "attention": 1.0}
TOKENS, LENGTH, WIDTH = 4, 12, 6


def batch(weights=(1, 1, 1), questions=(True, True)):
    """Sample 0 has images 0 and 1, sample 1 has image 2."""
    images = len(weights)
    labels = torch.full((2, LENGTH), IGNORE)
    labels[0, 9:] = torch.tensor([1, 2, 3])
    labels[1, 10:] = torch.tensor([4, 5])
    question = torch.zeros(2, LENGTH, dtype=torch.bool)
    question[:, 8] = torch.tensor(questions)
    valid = torch.ones(images, TOKENS, dtype=torch.bool)
    valid[0, 3] = False
    return Batch(
        input_ids=torch.zeros(2, LENGTH, dtype=torch.int64),
        attention_mask=torch.ones(2, LENGTH, dtype=torch.bool),
        labels=labels,
        question_mask=question,
        image_index=torch.full((2, LENGTH), -1),
        student_pixels=torch.zeros(images, 3, 2, 2),
        teacher_pixels=torch.zeros(images, 3, 2, 2),
        image_weight=torch.tensor(weights, dtype=torch.float32),
        patch_valid=valid,
        image_sample=torch.tensor([0, 0, 1])[:images],
    )


def values(images=3):
    generator = torch.Generator().manual_seed(0)
    leaves = {
        "logits": torch.randn(2, 4, 7, generator=generator),
        "tokens": torch.randn(images, TOKENS, WIDTH, generator=generator),
        "attention": torch.rand(images, TOKENS, generator=generator) / 10,
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = StudentOutput(kept=torch.arange(8, 12), **leaves)
    targets = TeacherTargets(
        features=torch.randn(images, TOKENS, 5, generator=generator),
        attention=torch.rand(images, TOKENS, generator=generator),
    )
    return leaves, output, targets


def test_total_is_the_weighted_sum_of_the_terms():
    _, output, targets = values()
    scale = {"language": 0.5, "similarity": 0.25, "attention": 2.0}
    report = objective(0.3, 0.7)(output, targets, batch(), scale)
    similarity = token_similarity(output.tokens, targets.features).sum()
    attention = attention_kl(output.attention, targets.attention).sum()
    torch.testing.assert_close(report.terms["similarity"].sum, similarity)
    torch.testing.assert_close(report.terms["attention"].sum, attention)
    expected = 0.5 * report.terms["language"].sum + 0.3 * 0.25 * similarity + 0.7 * 2 * attention
    torch.testing.assert_close(report.total, expected)


@pytest.mark.parametrize(
    ("weights", "questions", "mean", "counts"),
    [
        ((1, 1, 1), (True, True), "tokens", (5, 3, 3)),
        ((1, 0, 1), (True, False), "tokens", (5, 2, 1)),
        ((0,), (True, True), "tokens", (5, 0, 0)),
        ((1, 1, 1), (True, True), "samples", (2, 3, 3)),
    ],
)
def test_counts_come_from_the_batch_and_agree_with_the_terms(weights, questions, mean, counts):
    _, output, targets = values(len(weights))
    losses = objective(language_mean=mean)
    micro_batch = batch(weights, questions)
    found = losses.counts(micro_batch)
    report = losses(output, targets, micro_batch, ONE)
    for name, count in zip(("language", "similarity", "attention"), counts, strict=True):
        assert found[name] == count == report.terms[name].count


def test_images_of_weight_zero_stay_connected_with_zero_gradient():
    leaves, output, targets = values(1)
    report = objective()(output, targets, batch((0,)), ONE)
    report.total.backward()
    for name in ("tokens", "attention"):
        assert (leaves[name].grad == 0).all()
    assert (leaves["logits"].grad != 0).any()


def test_an_image_without_a_question_has_no_attention_loss():
    leaves, output, targets = values()
    objective()(output, targets, batch(questions=(True, False)), ONE).total.backward()
    assert (leaves["attention"].grad[2] == 0).all() and (leaves["attention"].grad[:2] != 0).any(1).all()
    assert (leaves["tokens"].grad != 0).any(-1).all()


def test_the_attention_rows_decide_which_images_have_an_attention_loss():
    _, output, targets = values()
    rows = torch.zeros(2, LENGTH, dtype=torch.bool)
    rows[1, 10] = True  # inside the answer of sample 1
    term = objective()(output, targets, replace(batch(), attention_rows=rows), ONE).terms["attention"]
    assert term.count == 1 == objective().counts(replace(batch(), attention_rows=rows))["attention"]
    torch.testing.assert_close(term.sum, attention_kl(output.attention, targets.attention)[2])


def test_each_term_reaches_only_its_own_input():
    for name, reached in (("similarity", "tokens"), ("attention", "attention"), ("language", "logits")):
        leaves, output, targets = values()
        objective()(output, targets, batch(), ONE).terms[name].sum.backward()
        assert [leaf for leaf, value in leaves.items() if value.grad is not None] == [reached]


def test_a_term_with_coefficient_zero_is_reported_without_gradient_or_omitted():
    leaves, output, targets = values()
    report = objective(0.0, 0.0)(output, targets, batch(), ONE)
    assert set(report.terms) == {"language", "similarity", "attention"}
    report.total.backward()
    assert leaves["tokens"].grad is None and not report.terms["similarity"].sum.requires_grad
    bare = StudentOutput(logits=output.logits, kept=output.kept, tokens=None, attention=None)
    assert set(objective(0.0, 0.0)(bare, None, batch(), ONE).terms) == {"language"}
    with pytest.raises(ValueError, match="similarity has coefficient"):
        objective(1.0, 0.0)(bare, targets, batch(), ONE)
    with pytest.raises(ValueError, match="attention has coefficient .* no teacher targets"):
        objective(0.0, 1.0)(output, None, batch(), ONE)


def test_padding_can_be_ignored():
    leaves, output, targets = values()
    objective(ignore_padding=True)(output, targets, batch(), ONE).total.backward()
    for name in ("tokens", "attention"):
        assert (leaves[name].grad[0, 3] == 0).all()
        assert (leaves[name].grad[0, :3] != 0).any()


def test_pairs_can_be_weighted_by_the_teachers_attention():
    _, output, targets = values()
    report = objective(1.0, 0.0, weighting="teacher_attention", ignore_padding=True)(output, targets, batch(), ONE)
    mask = batch().patch_valid
    weight = attention_weights(targets.attention, mask)
    torch.testing.assert_close(weight.sum(1), mask.sum(1).float())
    expected = token_similarity(output.tokens, targets.features, mask, weight).sum()
    torch.testing.assert_close(report.terms["similarity"].sum, expected)
    assert attention_weights(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": -1.0}, "similarity.*-1"),
        ({"normalize": "l1"}, "normalize"),
        ({"weighting": "pairs"}, "weighting"),
        ({"language_mean": "words"}, "language_mean"),
    ],
)
def test_the_message_gives_the_invalid_setting(arguments, named):
    with pytest.raises(ValueError, match=named):
        objective(**arguments)
