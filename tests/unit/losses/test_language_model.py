"""The language loss on kept positions against the plain shifted cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from medalign.contracts import IGNORE
from medalign.losses.language_model import language_model, supervised_samples, supervised_tokens


def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 13, generator=generator).requires_grad_()
    labels = torch.randint(0, 13, (2, 8), generator=generator)
    labels[0, :3] = IGNORE
    labels[1, :6] = IGNORE
    return logits, labels


@pytest.mark.parametrize("kept", [list(range(8)), [2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 7]])
def test_equals_the_shifted_cross_entropy(kept):
    logits, labels = inputs()
    term = language_model(logits[:, kept], torch.tensor(kept), labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    assert term.count == 7 == supervised_tokens(labels)


@pytest.mark.parametrize("kept", [list(range(8)), [2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 7]])
@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_over_samples_equals_that_of_single_samples(kept, packed):
    """Packed: both rows in one, with the samples' numbers. Float32 sums of six terms differ by less than 1e-6."""
    logits, labels = inputs()
    means = [F.cross_entropy(row[:-1], words[1:]) for row, words in zip(logits, labels, strict=True)]
    (expected,) = torch.autograd.grad(sum(means), logits)
    samples, rows = torch.tensor([[0] * 8, [1] * 8]), logits[:, kept]
    if packed:
        labels, samples, rows = labels.view(1, 16), samples.view(1, 16), rows.reshape(1, -1, 13)
        kept = [place + start for start in (0, 8) for place in kept]
    term = language_model(rows, torch.tensor(kept), labels, samples)
    (found,) = torch.autograd.grad(term.sum, logits)
    torch.testing.assert_close(term.sum, sum(means), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert term.count == 2 == supervised_samples(labels, samples)


def test_a_sample_without_supervised_tokens_does_not_count():
    logits, labels = inputs()
    labels[0] = IGNORE
    samples = torch.tensor([[0] * 8, [1] * 8])
    term = language_model(logits, torch.arange(8), labels, samples)
    torch.testing.assert_close(term.sum, F.cross_entropy(logits[1, :-1], labels[1, 1:]))
    assert term.count == 1 == supervised_samples(labels, samples)
    labels[1] = IGNORE
    none = language_model(logits, torch.arange(8), labels, samples)
    assert none.sum == 0 == none.count and (torch.autograd.grad(none.sum, logits)[0] == 0).all()


def test_half_precision_is_converted_to_float32():
    logits, labels = inputs()
    term = language_model(logits.bfloat16(), torch.arange(8), labels)
    expected = language_model(logits.bfloat16().float(), torch.arange(8), labels)
    assert term.sum.dtype == torch.float32 and torch.equal(term.sum, expected.sum)


@pytest.mark.parametrize("kept", [[], [1, 2]])
def test_without_supervised_tokens_the_loss_is_zero_with_a_gradient(kept):
    logits, labels = inputs()
    labels[:] = IGNORE
    labels[:, 0] = 5  # nothing comes before it
    term = language_model(logits[:, kept], torch.tensor(kept, dtype=torch.int64), labels)
    assert term.sum == 0 == term.count
    (gradient,) = torch.autograd.grad(term.sum, logits)
    assert (gradient == 0).all()


def test_a_supervised_token_without_its_logit_is_an_error():
    logits, labels = inputs()
    with pytest.raises(ValueError, match="6 of 7"):
        language_model(logits[:, 3:], torch.arange(3, 8), labels)
    with pytest.raises(ValueError, match="logits"):
        language_model(logits, torch.arange(3, 8), labels)
