"""OPERA against transformers' beam search and against a plain implementation: equal tokens in float32."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from transformers import MistralConfig

from medalign.config import LoraConfig, StudentConfig
from medalign.decoding.base import Decoding
from medalign.decoding.checks import require_methods
from medalign.decoding.methods.opera import OPERA
from medalign.errors import ConfigError
from medalign.evaluation.generation import generate_answers
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny
from tests.unit.decoding import plain

TOKENS = {"pad_token_id": 0, "eos_token_id": [2]}
TEXTS = ((5, 0), (11, 0), (2, 0))
# The search returns early and often, and every candidate counts.
RETURNING = OPERA(num_beams=2, candidates=4, threshold=2, rollbacks=2, first_tokens=0, scale=30.0, factor=1e-3)


def load(folder, attention: str, **settings) -> Student:
    config = StudentConfig(path=str(folder), layer=2, lora=LoraConfig(rank=4), attention=attention, **settings)
    student = load_student(config, torch.float32).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(student.steering.weight, std=0.3)
    if student.mixture is not None:
        torch.nn.init.normal_(student.mixture.up, std=0.3)
    return student


@pytest.fixture(scope="module")
def student(student_folder) -> Student:
    return load(student_folder, "sdpa")


@pytest.fixture(scope="module")
def eager(student_folder) -> Student:
    return load(student_folder, "eager")


def answer(ids: torch.Tensor, ends: list[int]) -> list[int]:
    """The tokens up to the end token."""
    tokens = ids.tolist()
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mixture", [False, True])
def test_without_a_penalty_it_is_the_beam_search_of_transformers(student_folder, beams, mixture):
    student = load(student_folder, "sdpa", query_mixture=mixture)
    student.end_with(40)  # some hypotheses end early
    batch, tokens = tiny.batch(side="left", texts=TEXTS), TOKENS | {"eos_token_id": student.end_tokens}
    method = OPERA(num_beams=beams, candidates=3 * beams, penalty=0.0, normalize="vocabulary", threshold=99)
    expected, attention = Decoding().method.generate(student, batch, Decoding(12, num_beams=beams), **tokens)
    found, captured = method.generate(student, batch, Decoding(12), **tokens)
    for row in range(3):
        assert answer(found[row], student.end_tokens) == answer(expected[row], student.end_tokens)
    torch.testing.assert_close(captured, attention, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "method",
    [
        replace(RETURNING, threshold=99, first_tokens=4, scale=10.0, factor=0.1),
        RETURNING,
        replace(RETURNING, normalize="vocabulary", reselect="candidates"),
    ],
)
def test_the_answers_are_those_of_the_plain_search(student, eager, method):
    batch = tiny.batch(side="left", texts=TEXTS[:2])
    found, _ = method.generate(student, batch, Decoding(8), **TOKENS)
    places = []
    for row in range(2):
        expected, returned = plain.opera(eager, batch.sample(row), 8, **asdict(method))
        assert answer(found[row], [2]) == expected
        places += returned
    assert bool(places) == (method.threshold < 10)


def test_samples_without_images(student):
    batch = tiny.batch(side="left", texts=TEXTS, images=False)
    found, attention = RETURNING.generate(student, batch, Decoding(4), **TOKENS)
    assert len(found) == 3 and attention is None


def test_a_last_block_with_a_window_is_refused(tmp_path):
    folder = tiny.save_student(tmp_path / "student", kind=MistralConfig, sliding_window=11)
    with pytest.raises(ConfigError, match=r"--decoding opera reads .* \(block 2\) covers only 11; choose"):
        require_methods([OPERA()], StudentConfig(path=str(folder), layer=2))


def test_more_candidates_than_tokens_are_refused(student_folder):
    with pytest.raises(ConfigError, match=r"candidates is 100000, but the student has only \d+ tokens"):
        require_methods([OPERA(candidates=100000)], StudentConfig(path=str(student_folder), layer=2))


def test_beams_and_sampling_are_refused():
    with pytest.raises(ConfigError, match="opera cannot be combined with --num-beams 3: .* --decoding.opera.num_beams"):
        Decoding(num_beams=3, method=OPERA())
    with pytest.raises(ConfigError, match="opera cannot be combined with --do-sample: it is a beam search"):
        Decoding(do_sample=True, method=OPERA())


def test_a_tokenizer_without_a_padding_token_gives_the_same_answers(student):
    batch, decoding = tiny.batch(side="left", texts=TEXTS), Decoding(8, method=OPERA(num_beams=2))
    words = tiny.tokenizer()
    expected = generate_answers(student, words, batch, decoding)
    words.pad_token = None
    assert generate_answers(student, words, batch, decoding) == expected
