"""PAI and VHR against plain implementations: equal tokens in float32, for several families, images and samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from medalign.decoding.base import Decoding, Method
from medalign.decoding.methods.pai import PAI
from medalign.decoding.methods.vhr import VHR, vision_aware_heads
from medalign.errors import ConfigError
from tests.unit.decoding import plain
from tests.unit.decoding.asked import LIMIT, Asked

STRONG = PAI(alpha=1.5, first_block=1, gamma=1.5, beta=0.1)


@pytest.fixture(scope="module", params=["llava", "llava_mistral", "qwen2_5_vl", "gemma3"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked.of(request.param, tmp_path_factory.mktemp("interventions"))


@pytest.mark.parametrize("method", [STRONG, replace(STRONG, beta=0.0), replace(STRONG, gamma=1.0)])
def test_pai_gives_the_tokens_of_the_plain_implementation(asked: Asked, method: PAI) -> None:
    found = asked.answers(method)
    for row in range(3):
        sample = asked.batch.sample(row)
        gamma = method.gamma if (sample.image_index >= 0).any() else 1.0
        expected = plain.pai(asked.eager, sample, LIMIT, method.alpha, gamma, method.beta, method.first_block)
        assert found[row] == expected


@pytest.mark.parametrize("method", [VHR(alpha=3.0), VHR(share=1.0, second_block=False)])
def test_vhr_gives_the_tokens_of_the_plain_implementation(asked: Asked, method: VHR) -> None:
    found = asked.answers(method)
    blocks = {3.0: [1, 2], 2.0: [0, 1, 2]}[method.alpha]
    for row in range(3):
        sample = asked.batch.sample(row)
        alpha = method.alpha if (sample.image_index >= 0).any() else 1.0
        assert found[row] == plain.vhr(asked.eager, sample, LIMIT, alpha, blocks)


def test_they_change_answers(asked: Asked) -> None:
    """Otherwise equal tokens would prove nothing."""
    greedy = asked.answers(Decoding().method)
    for method in (STRONG, VHR(alpha=3.0)):
        found = asked.answers(method)
        assert found[:2] != greedy[:2] and found[2] == greedy[2]


@pytest.mark.parametrize("method", [PAI(alpha=5.0, gamma=1.0), VHR(second_block=False)])
def test_the_tapped_block_reports_its_attention_without_the_intervention(asked: Asked, method: Method) -> None:
    """Both change block 2, the tapped one, and no block before."""
    maps = [asked.generate(one, asked.batch)[1] for one in (Decoding().method, method)]
    assert maps[0].shape == (3, asked.student.spec.grid.size)
    assert maps[0].equal(maps[1])


def test_heads_under_beams_are_those_of_their_sample(asked: Asked) -> None:
    asked.require_equal_beams(VHR(alpha=3.0))


def test_heads_that_grow_without_the_image_are_left_out() -> None:
    """Head 2 has the largest divergence, but because of its output without the image."""
    own = torch.tensor([[[1.0, 0], [3, 0], [0, 0], [0, 0.5]]])
    other = torch.tensor([[[1.0, 0.1], [1, 0], [9, 0], [0, 0.1]]])
    assert vision_aware_heads(own, other).tolist() == [[False, True, False, True]]
    assert vision_aware_heads(own, other.clamp(max=2.0)).tolist() == [[False, True, True, False]]


def test_no_head_is_reinforced_if_the_image_changes_none() -> None:
    own = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    rounded = own * (1 + 1e-4 * torch.arange(4)[:, None])
    assert not vision_aware_heads(own, rounded).any()


def test_a_first_block_that_the_student_has_not_is_refused(asked: Asked) -> None:
    with pytest.raises(ConfigError, match=r"--decoding.pai.first_block is 3, but .* indices 0 to 2"):
        PAI(first_block=3).check(asked.student.spec, Any)
