"""Answers and their attention, sample by sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from medalign.contracts import Sample
from medalign.evaluation import generate
from medalign.evaluation.generate import Answer, answer
from medalign.geometry import PatchGrid
from tests import tiny


class Fixed:
    """A student of which only `generate` is asked: the same words, and a map for each of three images."""

    def __init__(self, *words: int, end_tokens: tuple[int, ...] = (2,)) -> None:
        self.words, self.end_tokens = words or (72, 2), list(end_tokens)
        self.told: dict[str, Any] = {}

    def generate(self, batch: Any, **told: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.told = told
        ids = torch.tensor([self.words] * len(batch.input_ids))
        return ids, torch.arange(3.0)[:, None].expand(3, 16)


def test_an_answer_comes_with_the_map_of_its_first_image() -> None:
    batch = tiny.batch(texts=((3, 1), (2, 1), (4, 1)))
    batch.image_sample = torch.tensor([0, 0, 2])
    maps = [given.attention for given in answer(Fixed(), tiny.tokenizer(), batch, 2)]  # type: ignore[arg-type]
    assert maps == [[0.0] * 16, None, [2.0] * 16]


def test_an_answer_ends_where_the_model_ends_it() -> None:
    """Also at an end token that the tokenizer does not know as special; what follows it is no part of the answer."""
    yes = tiny.tokenizer()("yes")["input_ids"]
    student = Fixed(*yes, 97, *yes, end_tokens=(2, 97))
    answers = answer(student, tiny.tokenizer(), tiny.batch(), 9)  # type: ignore[arg-type]
    assert [given.text for given in answers] == ["yes"] * 2
    assert student.told["eos_token_id"] == [2, 97]


@pytest.mark.parametrize(
    ("box", "grounded"),
    [
        ((10.0, 10.0, 12.0, 12.0), True),  # two pixels of 3000
        ((3000.0, 10.0, 3001.0, 20.0), False),  # in the pixel beyond the edge that shards let pass
    ],
)
def test_a_box_of_any_size_is_no_reason_to_stop(box: tuple[float, ...], grounded: bool) -> None:
    student = SimpleNamespace(anatomy=SimpleNamespace(grid=PatchGrid(4, 4)))
    film = Image.new("L", (3000, 2400))
    sample = Sample("k", "none", "vqa", "q", "yes", "closed", (film,), (box,))  # type: ignore[arg-type]
    row = generate._prediction(student, sample, Answer("yes", [1.0] * 16))  # type: ignore[arg-type]
    assert (row.attention_inside is not None) is grounded and row.boxes == [list(box)]
