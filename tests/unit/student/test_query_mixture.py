"""The query-adaptive mixture: one decision per sample, which is kept during generation."""

import pytest
import torch
from torch import nn

from medalign.config import LoraConfig, StudentConfig
from medalign.errors import ConfigError
from medalign.student.loading import load_student
from medalign.student.query_mixture import QueryMixture
from tests import tiny


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
    with pytest.raises(RuntimeError, match="before the complete sequence"):
        mixture(hidden[:, 7:])


def test_beams_share_the_decision_of_their_sample():
    mixture, hidden, question = inputs()
    mixture.begin(question)
    whole = mixture(hidden)
    beams = mixture(hidden.repeat_interleave(3, dim=0))
    torch.testing.assert_close(beams, whole.repeat_interleave(3, dim=0))


def test_each_sample_of_a_packed_batch_has_its_own_decision():
    """The third sample has no question: its first token decides, not a token of another sample."""
    mixture, hidden, question = inputs()
    hidden, question = torch.cat([hidden, torch.randn(1, 8, 6)]), torch.cat([question, torch.zeros(1, 8).bool()])
    mixture.begin(question)
    apart = mixture(hidden)
    mixture.begin(question.view(1, -1), torch.tensor([0, 8, 16, 24]))
    torch.testing.assert_close(mixture(hidden.view(1, 24, 6)).view(3, 8, 10), apart)


def test_padding_before_a_sample_without_a_question_decides_nothing():
    mixture, hidden, _ = inputs()
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, :3] = False
    mixture.begin(torch.zeros_like(valid), valid_BL=valid)
    padded = mixture(hidden)
    mixture.begin(torch.zeros(1, 5, dtype=torch.bool))
    torch.testing.assert_close(padded[1:, 3:], mixture(hidden[1:, 3:]))


def test_a_question_without_an_image_has_the_same_gates_alone_in_a_batch_and_in_training(student_folder):
    student = load_student(StudentConfig(str(student_folder), layer=1, query_mixture=True), torch.float32).eval()
    texts = ((5, 0), (11, 0))
    batch = tiny.batch(images=False, side="left", texts=texts)
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    student.generate(batch, **settings)
    together = student.mixture.decided
    student.generate(batch.sample(0), **settings)
    torch.testing.assert_close(together[:1], student.mixture.decided)
    student(tiny.batch(images=False, side="right", texts=texts), tap=False)
    torch.testing.assert_close(together, student.mixture.decided)


def test_attached_to_a_projection_it_adds_to_its_output():
    mixture, hidden, question = inputs()
    projection = nn.Linear(6, 10)
    plain = projection(hidden)
    mixture.attach(projection)
    assert torch.equal(projection(hidden), plain)  # begin was not called
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


def test_without_begin_or_gates_it_is_an_error():
    mixture, hidden, _ = inputs()
    with pytest.raises(RuntimeError, match="begin"):
        mixture(hidden)
    torch.testing.assert_close(mixture(hidden, torch.zeros(2, 3)), torch.zeros(2, 8, 10))


@pytest.mark.parametrize(("form", "dropout"), [("beside_lora", 0.0), ("official", 0.3)])
def test_the_official_mixture_replaces_lora(student_folder, form, dropout):
    lora = LoraConfig(rank=4, dropout=0.3)
    config = StudentConfig(str(student_folder), layer=1, lora=lora, query_mixture=True, query_mixture_form=form)
    student = load_student(config, torch.float32)
    adapted = {name.split(".lora_A")[0].split("model.")[-1] for name, _ in student.trainable()["adapters"]}
    adapted = {name.split(".lora_B")[0] for name in adapted}
    linear = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    every = {f"layers.{block}.{name}" for block in range(3) for name in linear}
    missing = {"layers.1.self_attn.q_proj"} if form == "official" else set()
    assert {name[name.index("layers.") :] for name in adapted} == every - missing
    assert student.mixture.dropout.p == dropout


def test_experts_can_be_initialized_as_in_lora():
    """Kaiming uniform with slope sqrt(5): uniform up to 1 / sqrt(width), for each expert separately."""
    down = QueryMixture(64, 10, experts=3, rank=200, lora_start=True).down.detach()
    bound = 64**-0.5
    assert down.abs().max() <= bound
    for expert in down:
        assert float(expert.std()) == pytest.approx(bound / 3**0.5, rel=0.02)  # 12,800 samples: standard error 0.6 %
    assert not torch.equal(down[0], down[1])


def test_dropout_applies_to_the_experts_but_not_to_the_router():
    torch.manual_seed(0)
    mixture = QueryMixture(6, 10, experts=3, rank=2, alpha=4, dropout=0.5)
    nn.init.normal_(mixture.up)
    hidden, question = torch.randn(1, 8, 6), torch.ones(1, 8, dtype=torch.bool)
    mixture.begin(question)
    torch.manual_seed(7)
    found = mixture(hidden)
    gradients = torch.autograd.grad(found.square().sum(), list(mixture.parameters()))
    torch.manual_seed(7)
    dropped = nn.functional.dropout(hidden, 0.5)[0]
    gates = (mixture.router.weight @ hidden[0, -1] + mixture.router.bias).softmax(0)
    expected = 2 * dropped @ sum(gates[e] * mixture.up[e] @ mixture.down[e] for e in range(3)).T
    torch.testing.assert_close(found[0], expected)
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), mixture.parameters()), strict=True):
        torch.testing.assert_close(one, other)
    mixture.eval()
    assert not torch.allclose(mixture(hidden), found)


def test_a_layer_that_does_not_exist_is_rejected_before_the_mixture_uses_it(student_folder):
    with pytest.raises(ConfigError, match="student.layer is 9, but it must be between 1 and 2"):
        load_student(StudentConfig(str(student_folder), layer=9, query_mixture=True), torch.float32)
