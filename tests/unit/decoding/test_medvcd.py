"""Med-VCD equals one written from its code and paper: one sample, no cache, eager attention, the model's own class."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from medalign.contracts import Sample
from medalign.decoding.base import Decoding, Method
from medalign.decoding.methods.medvcd import MedVCD, _Merging
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from tests.unit.decoding.test_contrast import Asked, ask, constrained, cut, logits
from tests.unit.student.families.cases import CASES
from tests.unit.student.families.test_families import collate, own_inputs

LIMIT = 14
FAMILIES = ("llava", "llava_mistral", "llava_next", "internvl")
OFTEN = MedVCD(alpha=0.5, sentence=4, kept=0.4)
PAPER = MedVCD(alpha=0.3, amplified=True, beta=0.3, sentence=3, kept=0.0)
RARELY = MedVCD(alpha=0.2, sentence=6, kept=0.8)  # the oldest of 6 entries stays as it is; 2 of 12 become one
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
    """A sample has the same beams in any batch. Settings that change nothing leave those of beam search."""
    assert answers(asked, NEUTRAL, num_beams=3) == answers(asked, Decoding().method, num_beams=3)
    found = answers(asked, OFTEN, num_beams=3)
    assert found != answers(asked, OFTEN)
    for row, answer in enumerate(found):
        assert answers(asked, OFTEN, slice(row, row + 1), num_beams=3) == [answer]


def test_the_oldest_tenth_is_merged_at_multiples_of_32_entries() -> None:
    """The published settings. After the first time, an answer has fewer entries than tokens."""
    prompt, merging, cache = 10, _Merging(10, 32, 0.9), DynamicCache()
    merged = {}
    for tokens in range(200):
        before = cache.get_seq_length()
        merging.before(nn.Identity(), (), {"past_key_values": cache})
        if cache.get_seq_length() < before:
            merged[tokens - 1] = 1 + before - cache.get_seq_length()
        new = torch.randn(1, 1, 1 if tokens else prompt, 4)
        cache.update(new, new, 0)
    assert merged == {32: 3, 66: 6, 103: 9, 143: 12, 186: 15}


def test_the_mask_loses_the_merged_entries() -> None:
    """flash-attention reads the last columns of a mask that is longer than the cache: padding would be read."""
    cache, mask = DynamicCache(), torch.ones(2, 10, dtype=torch.long)
    key = torch.randn(2, 1, 9, 4)
    cache.update(key, 2 * key, 0)
    mask[0, :2] = 0
    _, found = _Merging(5, 4, 0.0).before(nn.Identity(), (), {"past_key_values": cache, "attention_mask": mask})
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    expected = torch.cat([key[:, :, :5], key[:, :, 5:].mean(2, keepdim=True)], 2)
    torch.testing.assert_close(cache.layers[0].keys, expected)
    torch.testing.assert_close(cache.layers[0].values, 2 * expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_other_positions_and_windows_are_refused(name: str, tmp_path: Path) -> None:
    config = CASES[name].config(CASES[name].save(tmp_path / name))
    spec, _ = check_student(config)
    with pytest.raises(ConfigError, match="--decoding medvcd merges tokens in the cache .* choose another method"):
        MedVCD().check(spec, config)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "embedding_multiplier"])
def test_scaled_embeddings_and_capped_logits_are_refused(
    key: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, config = asked.student.spec, asked.model.config
    MedVCD().check(spec, config)
    monkeypatch.setattr(spec.language_model.config, key, 12.0, raising=False)
    with pytest.raises(ConfigError, match="unscaled embeddings and logits without a cap, .* choose another method"):
        MedVCD().check(spec, config)
