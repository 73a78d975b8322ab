"""Med-VCD equals one written from its code and paper: one sample, no cache, eager attention, the model's own class."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medalign.contracts import Sample
from medalign.decoding.base import Decoding, Method
from medalign.decoding.methods.medvcd import MedVCD
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from tests.unit.decoding.test_contrast import Asked, ask, constrained, cut, logits
from tests.unit.student.families.cases import CASES
from tests.unit.student.families.test_families import collate, own_inputs

LIMIT = 14
FAMILIES = ("llava", "llava_mistral", "llava_next", "internvl")
OFTEN = MedVCD(alpha=0.5, sentence=4, kept=0.4)
PAPER = MedVCD(alpha=0.3, amplified=True, beta=0.3, sentence=3, kept=0.0)
RARELY = MedVCD(alpha=0.2, sentence=5)  # a tenth of 10 tokens is one token, and nothing is merged
NEUTRAL = MedVCD(alpha=0.0, kept=1.0)
Step = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return ask(request.param, tmp_path_factory.mktemp("medvcd"))


def answers(asked: Asked, method: Method, rows: slice = slice(None), **settings: Any) -> list[list[int]]:
    batch = collate(asked.model, asked.student, asked.samples[rows], with_answer=False, padding_side="left")
    decoding, ends = Decoding(LIMIT, method=method, **settings), asked.student.end_tokens
    ids, _ = method.generate(asked.student, batch, decoding, pad_token_id=0, eos_token_id=ends)
    return [cut(row, ends) for row in ids.tolist()]


def entries(prompt: int, count: int, method: MedVCD) -> list[torch.Tensor]:
    """For each token of the answer, what is in the cache when it is read, as weights [entries, tokens]."""
    found, times = [], 0
    cache = torch.eye(prompt + count)[:prompt]
    for token in range(prompt, prompt + count):
        own = len(cache) - prompt
        if own and own % method.sentence == 0 and own // method.sentence > times:
            times += 1
            oldest = int((1 - method.kept) * own)
            if oldest > 1:
                mean = cache[prompt : prompt + oldest].mean(0, keepdim=True)
                cache = torch.cat([cache[:prompt], mean, cache[prompt + oldest :]])
        cache = torch.cat([cache, torch.eye(prompt + count)[token : token + 1]])
        found.append(cache)
    return found


def plain_medvcd(asked: Asked, sample: Sample, method: MedVCD) -> Step:
    inputs = own_inputs(asked.model, sample)
    prompt, own = inputs["input_ids"].shape[1], asked.own
    blocks = {id(each.self_attn) for each in own.model.language_model.layers}
    source = sys.modules[type(own.model.language_model.layers[0].self_attn).__module__]
    original = source.eager_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
        output, weights = original(module, query, key, value, mask, scaling=scaling, **rest)
        if id(module) not in blocks:
            return output, weights
        key, value = (part[0].repeat_interleave(query.shape[1] // key.shape[1], 0) for part in (key, value))
        length = query.shape[2]
        for row, cache in zip(range(prompt, length), entries(prompt, length - prompt, method), strict=True):
            for head in range(query.shape[1]):
                seen = (query[0, head, row] @ (cache @ key[head]).T * scaling).softmax(-1)
                output[0, row, head] = seen @ (cache @ value[head])
        return output, weights

    def scores(answer: list[int]) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "eager_attention_forward", attend)
            last = logits(own, inputs, answer)
        token = torch.tensor([*inputs["input_ids"][0].tolist(), *answer][-1])
        early = own.get_output_embeddings()(own.get_input_embeddings()(token))
        weight = 1 + method.alpha if method.amplified else 1
        return constrained(weight * last - method.alpha * early, last, method.beta)

    return scores


@pytest.mark.parametrize("method", [OFTEN, PAPER, RARELY], ids=["often", "paper", "rarely"])
@torch.no_grad()
def test_tokens_equal_those_of_the_code(asked: Asked, method: MedVCD) -> None:
    found = answers(asked, method)
    for sample, answer in zip(asked.samples, found, strict=True):
        next_scores, expected = plain_medvcd(asked, sample, method), []
        while len(expected) < LIMIT and (token := int(next_scores(expected).argmax())) not in asked.student.end_tokens:
            expected.append(token)
        assert answer == expected, sample.question


def test_each_part_has_an_effect(asked: Asked) -> None:
    greedy = answers(asked, Decoding().method)
    assert answers(asked, NEUTRAL) == greedy
    assert max(map(len, greedy)) == LIMIT, "no answer is long enough to be merged"
    assert answers(asked, MedVCD(alpha=0.5, kept=1.0)) != greedy
    assert answers(asked, MedVCD(alpha=0.0, sentence=3, kept=0.0)) != greedy


def test_beams(asked: Asked) -> None:
    """A sample's beams are those that it has alone, and without an effect those of beam search."""
    assert answers(asked, NEUTRAL, num_beams=3) == answers(asked, Decoding().method, num_beams=3)
    found = answers(asked, OFTEN, num_beams=3)
    assert found != answers(asked, OFTEN)
    for row, answer in enumerate(found):
        assert answers(asked, OFTEN, slice(row, row + 1), num_beams=3) == [answer]


def test_the_oldest_tenth_is_merged_after_32_tokens() -> None:
    """The published settings: 3 of 32 tokens become one, then 6 of 64 entries."""
    sizes = [len(cache) for cache in entries(10, 100, MedVCD())]
    assert sizes[:35] == [*range(11, 43), 41, 42, 43]
    assert sizes[65:68] == [74, 70, 71]  # 64 entries of the answer: 6 become one


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_other_positions_and_windows_are_refused(name: str, tmp_path: Path) -> None:
    config = CASES[name].config(CASES[name].save(tmp_path / name))
    spec, _ = check_student(config)
    with pytest.raises(ConfigError, match="--decoding medvcd merges tokens in the cache, .* choose another method"):
        MedVCD().check(spec, config)
