"""W: no effect when untrained, only on image tokens, a gradient of zero without images, and when it can be folded."""

from pathlib import Path

import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.student.loading import load_student
from medalign.student.model import Student
from medalign.student.steering import Steering
from tests import tiny


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


def test_low_rank_is_the_product_of_two_factors():
    hidden, mask = inputs()
    steering = Steering(5, epsilon=0.5, rank=2)
    assert torch.equal(steering(hidden, mask), hidden)  # untrained
    torch.nn.init.normal_(steering.up)
    matrix = steering.up @ steering.down
    assert matrix.shape == (5, 5) and torch.linalg.matrix_rank(matrix) == 2
    steered = steering(hidden, mask)
    torch.testing.assert_close(steered[mask], hidden[mask] + 0.5 * hidden[mask] @ matrix.T)
    assert torch.equal(steered[~mask], hidden[~mask])
    steering(hidden, torch.zeros_like(mask)).sum().backward()
    assert all((p.grad == 0).all() for p in steering.parameters())


def load(folder: Path) -> Student:
    student = load_student(StudentConfig(path=str(folder), layer=1, lora=LoraConfig(rank=4)), torch.float32).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(student.steering.weight, std=0.2)
    return student


def test_before_the_first_block_w_folds_into_the_projector(student_folder):
    """The only exact case: nothing lies between the projector and W. A student never taps block 0, though."""
    student, batch = load(student_folder), tiny.batch()
    spec, steering = student.spec, student.steering
    student.steering = None
    steer = lambda _block, args, kwargs: ((steering(args[0], batch.cells), *args[1:]), kwargs)  # noqa: E731
    handle = spec.blocks[0].register_forward_pre_hook(steer, with_kwargs=True)
    with torch.no_grad():
        expected = student(batch).logits
        handle.remove()
        before = student(batch).logits
        last = spec.projector.linear_2
        folded = torch.eye(32) + steering.weight
        last.weight.copy_(folded @ last.weight)
        last.bias.copy_(folded @ last.bias)
        found = student(batch).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_later_w_cannot_be_folded_into_any_weights(student_folder):
    """Counterexample: a text token with the hidden state of an image token.

    What is above the input of block l sees only hidden states, so whatever its weights are, it gives equal outputs for
    equal hidden states. With W the outputs differ, because W acts on one of the two only.
    """
    student, batch = load(student_folder), tiny.batch()
    embeddings = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for image in (True, False):
        student._begin_batch(batch)
        student._cells = torch.zeros(1, 6, dtype=torch.bool)
        student._cells[0, 2] = image
        with torch.no_grad():
            outputs.append(student.spec.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
    as_image, as_text = outputs
    assert torch.equal(as_image[:, :2], as_text[:, :2])  # causal
    assert (as_image[:, 2:] - as_text[:, 2:]).abs().amin(1).max() > 0.01
