"""Greedy answers, beams and samples: they do not depend on the batch, and samples follow the nucleus."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from medalign.config import LoraConfig, StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding
from medalign.decoding.nucleus import NucleusSampler
from medalign.errors import ConfigError
from medalign.evaluation.generation import generate_answers
from medalign.student.generation_settings import keep_only_tokens
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0])
SAMPLE = Decoding(max_new_tokens=12, do_sample=True, top_p=0.9, temperature=2.0, seed=1)


@pytest.fixture(scope="module")
def student(student_folder) -> Student:
    config = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4))
    student = load_student(config, torch.float32).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(student.steering.weight, std=0.3)
    return student


def one(batch: Batch, row: int) -> Batch:
    """A sample of a batch by itself, without padding."""
    valid = batch.attention_mask[row]
    rows = ("input_ids", "attention_mask", "labels", "question_mask", "image_index")
    cut = {name: getattr(batch, name)[row : row + 1, valid] for name in rows}
    pixels = batch.student_pixels[row : row + 1]
    cut["image_index"] = torch.where(cut["image_index"] >= 0, 0, -1)
    kept = {"student_pixels": pixels, "teacher_pixels": pixels, "image_sample": torch.zeros(1, dtype=torch.long)}
    kept |= {"image_weight": batch.image_weight[:1], "patch_valid": batch.patch_valid[:1]}
    return replace(batch, keys=(batch.keys[row],), **cut, **kept)


@pytest.mark.parametrize("decoding", [Decoding(12), Decoding(12, num_beams=3), SAMPLE])
def test_an_answer_does_not_depend_on_its_batch(student, decoding):
    """In float32 the tokens are equal, with the attention to 1e-5: sums over padded rows have another order."""
    batch = tiny.batch(side="left", texts=((5, 0), (11, 0), (2, 0)))
    whole = generate_answers(student, tiny.tokenizer(), batch, decoding)
    for row, expected in enumerate(whole):
        (alone,) = generate_answers(student, tiny.tokenizer(), one(batch, row), decoding)
        assert (alone.text, alone.finish_reason) == (expected.text, expected.finish_reason)
        torch.testing.assert_close(torch.tensor(alone.attention), torch.tensor(expected.attention), rtol=1e-5, atol=0)


def test_the_attention_under_beams_is_that_of_the_question(student):
    batch = tiny.batch(side="left", texts=((5, 0), (11, 0)))
    greedy, beams = (generate_answers(student, tiny.tokenizer(), batch, Decoding(4, num_beams=n)) for n in (1, 4))
    for first, second in zip(greedy, beams, strict=True):
        torch.testing.assert_close(torch.tensor(first.attention), torch.tensor(second.attention), rtol=1e-5, atol=0)


def test_samples_depend_on_the_seed_and_the_key(student):
    batch = tiny.batch(side="left", texts=((5, 0), (11, 0)))
    texts = [
        [answer.text for answer in generate_answers(student, tiny.tokenizer(), asked, decoding)]
        for asked, decoding in [
            (batch, SAMPLE),
            (batch, SAMPLE),
            (batch, replace(SAMPLE, seed=2)),
            (replace(batch, keys=("sample-0", "other")), SAMPLE),
        ]
    ]
    assert texts[0] == texts[1]
    assert texts[2][0] != texts[0][0] and texts[2][1] != texts[0][1]
    assert texts[3][0] == texts[0][0] and texts[3][1] != texts[0][1]


def draw(decoding: Decoding, count: int) -> torch.Tensor:
    """The share of each token of LOGITS among `count` draws at evenly spaced quantiles."""
    sampler = NucleusSampler(decoding.temperature, decoding.top_p, 0, 1, ["k"] * count, 3, torch.device("cpu"))
    sampler._draws_BT = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    scores = sampler(torch.zeros(count, 3, dtype=torch.long), LOGITS.expand(count, -1))
    assert (scores.isinf().sum(-1) == len(LOGITS) - 1).all()
    return torch.bincount(scores.argmax(-1), minlength=len(LOGITS)) / count


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.0, 0.9), (2.0, 1e-9)])
def test_samples_follow_the_nucleus(temperature, top_p):
    """Quantiles that are evenly spaced give each token its probability in the nucleus, to one part in their number."""
    probability = (LOGITS / temperature).softmax(0)
    kept = torch.zeros(len(LOGITS), dtype=torch.bool)
    for token in probability.argsort(descending=True):  # the smallest set with at least top_p
        if probability[kept].sum() < top_p:
            kept[token] = True
    expected = torch.where(kept, probability, 0) / probability[kept].sum()
    found = draw(Decoding(do_sample=True, temperature=temperature, top_p=top_p), 4000)
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 4000 + 1e-6)


def test_random_numbers_are_uniform_and_differ_by_key():
    sampler = NucleusSampler(1.0, 1.0, 0, 100, [f"s{i}" for i in range(200)], 0, torch.device("cpu"))
    draws = sampler._draws_BT
    assert draws.unique().numel() == draws.numel() and draws.min() >= 0 and draws.max() < 1
    # 20,000 draws: the mean has a standard error of 0.002
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws[:, 0].mean() - 0.5) < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"num_beams": 0}, "--num-beams is 0"),
        ({"do_sample": True, "top_p": 0.0}, "--top-p is 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "--top-p is 1.5"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature is 0.0"),
        ({"do_sample": True, "num_beams": 2}, "--num-beams 2 and --do-sample exclude each other"),
        ({"top_p": 0.9}, "--top-p 0.9 has no effect without --do-sample"),
        ({"temperature": 0.7}, "--temperature 0.7 has no effect without --do-sample"),
        ({"seed": 3}, "--seed 3 has no effect without --do-sample"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


def test_the_base_models_own_generation_settings_are_not_applied(student_folder, caplog):
    """Qwen2.5-VL, for example, has a penalty for repetition, which transformers applies to greedy decoding too."""
    config = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4))
    student = load_student(config, torch.float32).eval()
    batch, model = tiny.batch(side="left", texts=((5, 0),)), student.spec.model
    plain = generate_answers(student, tiny.tokenizer(), batch, Decoding(12))
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 7],
        pad_token_id=0,
        do_sample=True,
        temperature=0.2,
        repetition_penalty=5.0,
        max_length=4096,
        use_cache=True,
    )
    student.end_with(9)
    assert generate_answers(student, tiny.tokenizer(), batch, Decoding(12)) != plain
    with caplog.at_level(logging.INFO, "medalign"):
        keep_only_tokens(model)
    assert caplog.messages[-1:] == [
        "not applied from the base model's generation settings: do_sample True, repetition_penalty 5.0, temperature 0.2"
    ]
    assert student.end_tokens == [2, 7, 9]
    assert generate_answers(student, tiny.tokenizer(), batch, Decoding(12)) == plain
