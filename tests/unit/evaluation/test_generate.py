"""Answers and their attention, per sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample
from medalign.decoding.base import Decoding
from medalign.errors import DataError
from medalign.evaluation import generation
from medalign.evaluation.generation import Answer, generate_answers
from medalign.geometry import PatchGrid
from tests import tiny


class Fixed:
    """A student with only `generate`, which returns fixed tokens and an attention map for each of three images."""

    def __init__(self, *words: int, end_tokens: tuple[int, ...] = (2,)) -> None:
        self.words, self.end_tokens = words or (72, 2), list(end_tokens)
        self.arguments: dict[str, Any] = {}

    def generate(self, batch: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.arguments = arguments
        ids = torch.tensor([self.words] * len(batch.input_ids))
        return ids, torch.arange(3.0)[:, None].expand(3, 16)


def test_an_answer_has_the_attention_to_its_first_image() -> None:
    batch = tiny.batch(texts=((3, 1), (2, 1), (4, 1)))
    batch.image_sample = torch.tensor([0, 0, 2])
    maps = [given.attention for given in generate_answers(Fixed(), tiny.tokenizer(), batch, Decoding(2))]  # type: ignore[arg-type]
    assert maps == [[0.0] * 16, None, [2.0] * 16]


class Spoken(Fixed):
    """A student that generates the given tokens."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids, self.end_tokens, self.asked = torch.tensor(ids), [2], {}

    def generate(self, _batch: Any, **settings: Any) -> tuple[torch.Tensor, None]:
        self.asked = settings
        return self.ids, None


def test_an_answer_has_its_finish_reason() -> None:
    """An end token at the last position ends an answer too; padding is not an end token."""
    student, words = Spoken([[72, 73, 74], [72, 73, 2], [2, 0, 0], [72, 0, 2]]), tiny.tokenizer()
    given = generate_answers(student, words, tiny.batch(texts=((3, 1),) * 4), Decoding(3))  # type: ignore[arg-type]
    assert [one.finish_reason for one in given] == ["length", "stop", "stop", "stop"]
    assert [bool(one.text) for one in given] == [True, True, False, True]
    assert student.asked["eos_token_id"] == [2]


def test_any_of_several_end_tokens_ends_an_answer() -> None:
    assert generation.finish_reasons(torch.tensor([[72, 73, 74], [72, 73, 75]]), [2, 74]) == ["stop", "length"]


def test_an_answer_ends_at_the_end_tokens_of_the_model() -> None:
    """This includes an end token that is not special in the tokenizer; later tokens are not part of the answer."""
    yes = tiny.tokenizer()("yes")["input_ids"]
    student = Fixed(*yes, 97, *yes, end_tokens=(2, 97))
    answers = generate_answers(student, tiny.tokenizer(), tiny.batch(), Decoding(9))  # type: ignore[arg-type]
    assert [given.text for given in answers] == ["yes"] * 2
    assert student.arguments["eos_token_id"] == [2, 97]


@pytest.mark.parametrize(
    ("box", "grounded"),
    [
        ((10.0, 10.0, 12.0, 12.0), True),  # two pixels of 3000
        ((3000.0, 10.0, 3001.0, 20.0), False),  # in the pixel beyond the edge that shards accept
    ],
)
def test_a_box_of_any_size_does_not_stop_the_evaluation(box: tuple[float, ...], grounded: bool) -> None:
    student = SimpleNamespace(spec=SimpleNamespace(grid=PatchGrid(4, 4)))
    film = Image.new("L", (3000, 2400))
    sample = Sample("k", "none", "vqa", "q", "yes", "closed", (film,), (box,))  # type: ignore[arg-type]
    row = generation._prediction(student, sample, Answer("yes", [1.0] * 16))  # type: ignore[arg-type]
    assert (row.attention_inside is not None) is grounded and row.boxes == [list(box)]


@pytest.mark.parametrize(("text", "empty"), [("yes", False), ("", True)])
def test_a_prediction_has_its_finish_reason_and_whether_it_is_empty(text: str, empty: bool) -> None:
    sample = Sample("k", "none", "vqa", "q", "yes", "closed", ())
    row = generation._prediction(None, sample, Answer(text, None, "length"))  # type: ignore[arg-type]
    assert (row.finish_reason, row.empty) == ("length", empty)


def test_a_batch_of_which_nothing_can_be_encoded_says_why() -> None:
    """And not what the sample contains."""

    def reject(sample: Sample) -> None:
        raise BadSample(f"{sample.shard}/{sample.key}: the template rejects it")

    sample = Sample("k", "s.tar", "report", "Describe.", "a private report", "open", ())
    settings: dict[str, Any] = {"decoding": Decoding(2), "device": torch.device("cpu")}
    found = generation.predict(None, None, SimpleNamespace(prepare=reject), [sample], **settings)  # type: ignore[arg-type]
    assert found.rows == [] and found.unreadable == ("s.tar/k: the template rejects it",)


def test_attention_that_is_not_finite_names_the_sample() -> None:
    sample = Sample(
        "k", "s.tar", "vqa", "q?", "yes", "closed", (Image.new("L", (8, 8)),), boxes=((0.0, 0.0, 4.0, 4.0),)
    )
    student: Any = SimpleNamespace(spec=SimpleNamespace(grid=PatchGrid(1, 2)))
    with pytest.raises(DataError, match="s.tar/k: attention must be finite"):
        generation._prediction(student, sample, Answer("yes", [float("nan"), 1.0]))
