"""CAI against a plain implementation: equal heads and tokens in float32, for several families, images and samples."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medalign import evaluator, phantom
from medalign.contracts import Sample
from medalign.data.shards.index import ShardIndex
from medalign.decoding import caption_heads
from medalign.decoding.base import Decoding
from medalign.decoding.caption_heads import questions, read_pairs, separation
from medalign.decoding.methods import cai
from medalign.decoding.methods.cai import CAI
from medalign.errors import ConfigError, DataError
from tests.unit.decoding import plain
from tests.unit.decoding.asked import LIMIT, Asked

IMAGES = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 16, 1, 0)
    return folder / "train"


@pytest.fixture(scope="module", params=["llava", "llava_mistral", "qwen2_5_vl", "gemma3"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked.of(request.param, tmp_path_factory.mktemp("cai"))


@pytest.fixture(scope="module")
def method(asked: Asked, shards: Path) -> CAI:
    return CAI(shards=str(shards), alpha=30.0, share=0.3, images=IMAGES).prepare(asked.student, asked.collate)


def test_heads_and_tokens_are_those_of_the_plain_implementation(asked: Asked, method: CAI, shards: Path) -> None:
    assert method.found is not None
    pairs = read_pairs(ShardIndex.open(shards), asked.collate, method.request, IMAGES)
    described, questioned = (
        [view.sample(row) for view in views for row in range(len(view.input_ids))] for views in zip(*pairs, strict=True)
    )
    places = list(method.found.places)
    expected, shifts = plain.cai_heads(asked.eager, described, questioned, len(places))
    assert places == expected and len(places) == round(0.3 * len(shifts)) > 1
    for (block, head), shift in shifts.items():
        found = method.found.shifts[block][head]
        torch.testing.assert_close(found, shift, atol=1e-6, rtol=1e-4)  # sums in another order
    chosen = {place: 30.0 * shifts[place] for place in places}
    answers = asked.answers(method)
    for row in range(3):
        sample = asked.batch.sample(row)
        own = chosen if (sample.image_index >= 0).any() else {}
        assert answers[row] == plain.cai(asked.eager, sample, LIMIT, own)


def test_it_changes_answers_about_images_only(asked: Asked, method: CAI) -> None:
    """Otherwise equal tokens would prove nothing."""
    greedy, found = asked.answers(Decoding().method), asked.answers(method)
    assert found[:2] != greedy[:2] and found[2] == greedy[2]
    assert asked.answers(replace(method, alpha=0.0)) == greedy


def test_beams_are_shifted_like_their_sample(asked: Asked, method: CAI) -> None:
    asked.require_equal_beams(method)


def test_the_settings_name_the_heads_once_they_are_found(asked: Asked, method: CAI, shards: Path) -> None:
    settings = method.describe()
    assert settings["decoding.heads"] == [list(place) for place in method.found.places]
    content = ShardIndex.open(shards).fingerprint()
    assert settings["decoding.shards"] == list(content) and method.learned_from == content
    assert CAI(shards="here").describe()["decoding.shards"] == "here"
    assert "decoding.heads" not in CAI().describe()
    with pytest.raises(ConfigError, match="cai has found no heads yet; call `Decoding.prepare`"):
        asked.answers(CAI(shards=str(shards)))


def test_shards_that_are_evaluated_are_refused(method: CAI, shards: Path, tmp_path: Path) -> None:
    phantom.write_phantoms(tmp_path / "others", 1, 1, 7)
    indexes = [ShardIndex.open(place) for place in (tmp_path / "others" / "val", shards)]
    both = [Decoding(), Decoding(method=method)]
    evaluator._require_other_shards(both, ["others"], indexes[:1])
    with pytest.raises(ConfigError, match="cai learns from samples that are evaluated: .* --data films; name others"):
        evaluator._require_other_shards(both, ["others", "films"], indexes)


def test_classes_that_are_far_apart_are_told_apart_with_a_small_loss() -> None:
    values = np.linspace(0, 1, 8)[:, None]
    far, near, mixed = (separation(values + distance, values) for distance in (5, 1.2, 0.5))
    assert far[0] == near[0] == 1.0 > mixed[0]
    assert far[1] < near[1] < mixed[1]
    assert far[2] and separation(np.zeros((8, 2)), np.zeros((8, 2))) == (0.0, 1.0, True)  # it does not see the image


def test_a_fit_that_does_not_converge_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_heads, "_ITERATIONS", 2)
    values = np.random.default_rng(0).normal(size=(32, 4))
    accuracy, loss, converged = separation(values + 0.1, values)
    assert 0 <= accuracy <= 1 and loss > 0 and not converged


def test_an_image_counts_once_and_a_bad_sample_is_skipped(
    asked: Asked, shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = ShardIndex.open(shards)
    assert 16 < len(questions(index)) < len(index)  # several per film, and reports
    pairs = read_pairs(index, asked.collate, "Describe it.", 1000)
    assert sum(len(pair.question.input_ids) for pair in pairs) == 16
    assert pairs[0].question.keys == pairs[0].description.keys
    read, keys = ShardIndex.read, set(pairs[0].question.keys)

    def damaged(index: ShardIndex, i: int) -> Sample:
        if index.key(i) in keys:
            raise caption_heads.BadSample(f"{index.key(i)} is damaged")
        return read(index, i)

    monkeypatch.setattr(ShardIndex, "read", damaged)
    with caplog.at_level(logging.WARNING, "medalign"):
        others = read_pairs(index, asked.collate, "Describe it.", 4)
    assert not keys & set(others[0].question.keys) and len(others[0].question.keys) == 4
    assert "bad sample skipped" in caplog.text


def test_what_is_missing_is_named(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, message in (
        (CAI(), "--decoding.cai.shards is missing; name a folder of shards"),
        (CAI(shards=str(shards), request=" "), "--decoding.cai.request is ' '; write a request"),
        (CAI(shards=str(shards), request="<image> Describe it."), "write a request .* without a place for the image"),
        (CAI(shards=str(shards), request="<|image_pad|> it"), "write a request .* without a place for the image"),
        (CAI(shards=str(shards), images=1000), r"images is 1000, but .*train has \d+ questions about images; choose"),
    ):
        with pytest.raises(ConfigError, match=message):
            method.check(Any, Any)
    phantom.write_phantoms(tmp_path / "few", 1, 1, 0)
    with pytest.raises(ConfigError, match=r"few/train has \d questions about images, and 8 are needed; name other"):
        CAI(shards=str(tmp_path / "few" / "train")).check(Any, Any)
    with pytest.raises(DataError, match="nowhere"):
        CAI(shards=str(tmp_path / "nowhere")).check(Any, Any)
    monkeypatch.setattr(cai, "find_spec", lambda name: None if name == "sklearn" else importlib.util.find_spec(name))
    with pytest.raises(ConfigError, match="scikit-learn is not installed; install it with: pip install 'medalign"):
        CAI(shards=str(shards)).check(Any, Any)


def test_too_few_different_images_are_named(asked: Asked, shards: Path) -> None:
    method = CAI(shards=str(shards), images=17)
    method.check(Any, Any)  # there are more questions than that
    with pytest.raises(ConfigError, match="images is 17, but .* has 16 different images with a question; choose"):
        method.prepare(asked.student, asked.collate)
