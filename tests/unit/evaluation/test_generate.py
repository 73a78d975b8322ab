"""Answers and their attention, sample by sample."""

from __future__ import annotations

from typing import Any

import torch

from medalign.evaluation.generate import answer
from tests import tiny


class Fixed:
    """A student of which only `generate` is asked: the same words, and a map for each of three images."""

    def generate(self, batch: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[72, 2]] * len(batch.input_ids))
        return ids, torch.arange(3.0)[:, None].expand(3, 16)


def test_an_answer_comes_with_the_map_of_its_first_image() -> None:
    batch = tiny.batch(texts=((3, 1), (2, 1), (4, 1)))
    batch.image_sample = torch.tensor([0, 0, 2])
    maps = [given.attention for given in answer(Fixed(), tiny.tokenizer(), batch, 2)]  # type: ignore[arg-type]
    assert maps == [[0.0] * 16, None, [2.0] * 16]
