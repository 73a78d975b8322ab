"""The supervision of the base student's attention: the tokens of a question and the patches of its region."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import medalign
from tools.phantom_models import train_student as tool

STUDENT = Path(medalign.__file__).parent / "assets" / "phantom_student"


@pytest.fixture(scope="module")
def course():
    return tool.Course(0, 8, AutoProcessor.from_pretrained(STUDENT))


@pytest.fixture(scope="module")
def lesson(course):
    return course.lesson(np.random.default_rng(0), count=6, turns=5, unrelated=0.0)


def test_question_tokens_decode_to_the_question(course):
    made = tool.Turn("Where is the disc?", "top left"), tool.Turn("Is there a ring?", "no")
    code = course.encode(list(made), image=True)
    shown = [course.tokenizer.decode(code.ids[start:end]) for start, end in code.questions]
    assert all(turn.question in text for turn, text in zip(made, shown, strict=True))
    assert "<image>" not in shown[0] and "top left" not in "".join(shown)


def test_the_target_of_a_question_is_its_region(lesson):
    known = lesson.where_BTN.sum(-1) > 0
    assert 5 < int(known.sum()) < known.numel()
    torch.testing.assert_close(lesson.where_BTN.sum(-1)[known], torch.ones(int(known.sum())))
    torch.testing.assert_close(lesson.rows_BTL.sum(-1)[known], torch.ones(int(known.sum())))
    assert not (lesson.rows_BTL[..., 1:2] > 0).any(), "the first tokens are the picture's opening"


def test_the_pointing_loss_is_lowest_for_attention_to_the_region(lesson):
    image_id = AutoProcessor.from_pretrained(STUDENT).tokenizer.convert_tokens_to_ids("<image>")
    length = lesson.ids_BL.shape[1]
    image_BL = lesson.ids_BL == image_id

    def loss(where_BTN):
        attention_BHLL = torch.zeros(len(image_BL), 2, length, length)
        for b, t in (lesson.where_BTN.sum(-1) > 0).nonzero().tolist():
            rows = lesson.rows_BTL[b, t] > 0
            attention_BHLL[b, :, rows] = torch.zeros(length).masked_scatter(image_BL[b], where_BTN[b, t])
        return tool.pointing_loss((attention_BHLL,) * 3, lesson, image_id)

    known = lesson.where_BTN[lesson.where_BTN.sum(-1) > 0]
    entropy = -(known * known.clamp_min(1e-6).log()).sum(-1).mean()
    torch.testing.assert_close(loss(lesson.where_BTN), entropy)
    assert loss(torch.full_like(lesson.where_BTN, 1 / 64)) > entropy + 0.5
