"""The query-adaptive mixture: one decision a sample, held while answering."""

import pytest
import torch
from torch import nn

from medalign.student.query_mixture import QueryMixture


def inputs():
    torch.manual_seed(0)
    mixture = QueryMixture(6, 10, experts=3, rank=2, alpha=4)
    nn.init.normal_(mixture.up)
    question = torch.zeros(2, 8, dtype=torch.bool)
    question[0, 3:6] = question[1, 1:3] = True
    return mixture, torch.randn(2, 8, 6), question


def test_untrained_adds_nothing():
    mixture = QueryMixture(6, 10)
    mixture.begin(torch.ones(2, 8, dtype=torch.bool))
    assert (mixture(torch.randn(2, 8, 6)) == 0).all()


def test_formula():
    mixture, hidden, question = inputs()
    mixture.begin(question)
    added = mixture(hidden)
    for sample, last in ((0, 5), (1, 2)):
        gates = (mixture.router.weight @ hidden[sample, last] + mixture.router.bias).softmax(0)
        update = sum(gates[e] * mixture.up[e] @ mixture.down[e] for e in range(3))
        torch.testing.assert_close(added[sample], 2 * hidden[sample] @ update.T)


def test_the_decision_of_the_prompt_holds_for_single_tokens():
    mixture, hidden, question = inputs()
    mixture.begin(question)
    whole = mixture(hidden)
    torch.testing.assert_close(mixture(hidden[:, 7:]), whole[:, 7:])
    mixture.begin(question)
    with pytest.raises(RuntimeError, match="before the whole sequence"):
        mixture(hidden[:, 7:])


def test_beams_share_the_decision_of_their_sample():
    mixture, hidden, question = inputs()
    mixture.begin(question)
    whole = mixture(hidden)
    beams = mixture(hidden.repeat_interleave(3, dim=0))
    torch.testing.assert_close(beams, whole.repeat_interleave(3, dim=0))


def test_each_sample_of_a_packed_batch_has_its_own_decision():
    """The third sample asks nothing: its first token decides, and no token of its neighbours."""
    mixture, hidden, question = inputs()
    hidden, question = torch.cat([hidden, torch.randn(1, 8, 6)]), torch.cat([question, torch.zeros(1, 8).bool()])
    mixture.begin(question)
    apart = mixture(hidden)
    mixture.begin(question.view(1, -1), torch.tensor([0, 8, 16, 24]))
    torch.testing.assert_close(mixture(hidden.view(1, 24, 6)).view(3, 8, 10), apart)


def test_attached_to_a_projection_it_adds_to_its_output():
    mixture, hidden, question = inputs()
    projection = nn.Linear(6, 10)
    plain = projection(hidden)
    mixture.attach(projection)
    assert torch.equal(projection(hidden), plain)  # no batch has begun
    mixture.begin(question)
    torch.testing.assert_close(projection(hidden), plain + mixture(hidden))
    assert "mixture" not in dict(projection.named_modules())


def test_gradients_are_the_same_under_checkpointing():
    mixture, hidden, question = inputs()
    projection = nn.Linear(6, 10)
    mixture.attach(projection)
    mixture.begin(question)
    found = []
    for checkpointed in (False, True):
        mixture.zero_grad()
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(projection, hidden, use_reentrant=False)
        else:
            output = projection(hidden)
        output.square().sum().backward()
        found.append([parameter.grad.clone() for parameter in mixture.parameters()])
    assert all((gradient != 0).any() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_without_begin_or_gates_it_refuses():
    mixture, hidden, _ = inputs()
    with pytest.raises(RuntimeError, match="begin"):
        mixture(hidden)
    torch.testing.assert_close(mixture(hidden, torch.zeros(2, 3)), torch.zeros(2, 8, 10))
