"""Several tapped blocks: a list of one is the single block; the losses are the weighted means over the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medalign import config as settings
from medalign.config import LoraConfig, LossConfig, StudentConfig
from medalign.contracts import Batch, TeacherTargets
from medalign.errors import ConfigError
from medalign.losses import Objective, build_terms
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny


def load(folder: Path, layer: int | list[int], **more: Any) -> Student:
    lora = LoraConfig(rank=4, alpha=8)
    student = load_student(StudentConfig(path=str(folder), layer=layer, lora=lora, **more), torch.float32).train()
    torch.manual_seed(1)
    for group, named in student.trainable().items():
        for _, parameter in named:
            torch.nn.init.normal_(parameter, std=0.05)
        assert group in ("adapters", "steering")
    return student


@pytest.fixture(scope="module")
def targets() -> TeacherTargets:
    draw = torch.Generator().manual_seed(2)
    return TeacherTargets(torch.randn(2, 16, 6, generator=draw), torch.rand(2, 16, generator=draw))


def step(student: Student, batch: Batch, targets: TeacherTargets, **losses: Any) -> dict[str, torch.Tensor]:
    """Return the terms, the total, and the gradients of a step."""
    objective = Objective(build_terms(LossConfig(alpha=0.7, beta=0.5, impl="reference", **losses)))
    report = objective(student(batch), targets, batch, dict.fromkeys(objective.coefficients, 1.0))
    report.total.backward()
    values = {name: term.sum.detach() for name, term in report.terms.items()} | {"total": report.total.detach()}
    return values | {name: p.grad for named in student.trainable().values() for name, p in named if p.grad is not None}


def test_a_list_of_one_equals_the_single_block_bit_for_bit(student_folder: Path, targets: TeacherTargets) -> None:
    batch = tiny.batch()
    one, listed = (step(load(student_folder, layer), batch, targets) for layer in (2, [2]))
    assert one.keys() == listed.keys() and "steering.weight" in one
    assert all(torch.equal(one[name], listed[name]) for name in one)


def test_each_block_gives_its_own_tokens_and_attention(student_folder: Path) -> None:
    """In the order of the list. Without W, they are those of students with one tapped block."""
    batch = tiny.batch()
    with torch.no_grad():
        both = load(student_folder, [2, 1], steering=False)(batch).blocks
        for block, layer in zip(both, (2, 1), strict=True):
            (alone,) = load(student_folder, layer, steering=False)(batch).blocks
            assert torch.equal(block.tokens, alone.tokens) and torch.equal(block.attention, alone.attention)
        assert load(student_folder, [2, 1])(batch, tap=False).blocks == ()


def cosines(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


def test_losses_and_gradients_equal_plain_code(student_folder: Path, targets: TeacherTargets) -> None:
    """Weights 3 and 1 are three quarters and one quarter."""
    batch = tiny.batch()
    found = step(load(student_folder, [2, 1]), batch, targets, layer_weights=[3.0, 1.0])
    plain = load(student_folder, [2, 1])
    output = plain(batch)
    language = found["language"]
    supervised = F.cross_entropy(
        output.logits.flatten(0, 1), batch.labels[:, output.kept + 1].flatten(), reduction="sum"
    )
    torch.testing.assert_close(supervised.detach(), language)
    similarity, attention = [], []
    assert targets.attention is not None
    goal = targets.attention / targets.attention.sum(1, keepdim=True)
    for block in output.blocks:
        similarity.append((cosines(block.tokens) - cosines(targets.features)).square().mean((1, 2)).sum())
        share = block.attention / block.attention.sum(1, keepdim=True)
        attention.append((goal * (goal / share).log()).sum())
    vis, att = (0.75 * first + 0.25 * second for first, second in (similarity, attention))
    (supervised + 0.7 * vis + 0.5 * att).backward()
    torch.testing.assert_close(found["similarity"], vis.detach())
    torch.testing.assert_close(found["attention"], att.detach())
    assert {"steering.0.weight", "steering.1.weight"} <= found.keys()
    for named in plain.trainable().values():
        for name, parameter in named:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_images_reaches_every_w(student_folder: Path) -> None:
    student = load(student_folder, [1, 2])
    output = student(tiny.batch(images=False))
    (
        output.logits.sum() + sum(0 * block.tokens.sum() + 0 * block.attention.sum() for block in output.blocks)
    ).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for _, p in student.trainable()["steering"])


def test_the_first_block_is_the_one_that_is_reported(student_folder: Path) -> None:
    batch = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    words = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    maps = {
        str(layer): load(student_folder, layer, steering=False).eval().generate(batch, **words)[1]
        for layer in (2, [2, 1], [1, 2])
    }
    assert torch.equal(maps["2"], maps["[2, 1]"]) and not torch.equal(maps["2"], maps["[1, 2]"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student.layer", "[]"], r"student.layer is \[\]; it must be one block, or a list of different ones"),
        (["--student.layer", "[2, 2]"], r"student.layer is \[2, 2\]; it must be one block"),
        (["--student.layer", "[2, 0]"], "it must be > 0"),
        (["--losses.layer_weights", "[1, 2]"], "layer_weights has 2 numbers for 1 tapped blocks .student.layer"),
        (["--student.layer", "[2, 3]", "--losses.layer_weights", "[1]"], "has 1 numbers for 2 tapped blocks"),
        (
            ["--student.train", "full", "--student.quantization", "nf4"],
            "student.train is full, but student.quantization",
        ),
        (["--student.train", "full", "--student.lora.dora", "true"], "lora.dora is true, but student.train is full"),
        (
            ["--student.steering", "false", "--student.steering_rank", "4"],
            "steering_rank is 4, but student.steering is",
        ),
        (["--student.epsilon", "0"], "epsilon is 0, but student.steering is true: W would change no token .* to false"),
        (["--student.layer", "[2, 3]", "--losses.layer_weights", "[.inf, 1]"], "layer_weights is inf; it must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load("phantom", ["--data.train", "none", *words], models=False)


def test_a_list_of_one_block_is_the_number() -> None:
    words = ["--data.train", "none", "--student.layer", "[2]", "--student.steering", "false", "--student.epsilon", "0"]
    assert settings.load("phantom", words, models=False).student.layer == 2
