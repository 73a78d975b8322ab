"""W: no effect when untrained, only on image tokens, and a gradient of zero without images."""

import torch

from medalign.student.steering import Steering


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, generator=generator)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 3:6] = True
    return hidden, mask


def test_untrained_is_the_identity():
    hidden, mask = inputs()
    assert torch.equal(Steering(5)(hidden, mask), hidden)


def test_formula_on_image_tokens_only():
    hidden, mask = inputs()
    steering = Steering(5, epsilon=0.5)
    torch.nn.init.normal_(steering.weight)
    steered = steering(hidden, mask)
    torch.testing.assert_close(steered[mask], hidden[mask] + 0.5 * hidden[mask] @ steering.weight.T)
    assert torch.equal(steered[~mask], hidden[~mask])


def test_gradients_of_weight_and_input():
    hidden, mask = inputs()
    steering = Steering(5).double()
    torch.nn.init.normal_(steering.weight)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(steering, {"weight": w}, (x, mask)),
        (hidden.double().requires_grad_(), steering.weight),
    )


def test_without_image_the_weight_stays_in_the_graph():
    hidden, mask = inputs()
    steering = Steering(5)
    steering(hidden, torch.zeros_like(mask)).sum().backward()
    assert (steering.weight.grad == 0).all()


def test_keeps_the_type_of_the_hidden_states():
    hidden, mask = inputs()
    assert Steering(5)(hidden.bfloat16(), mask).dtype == torch.bfloat16
