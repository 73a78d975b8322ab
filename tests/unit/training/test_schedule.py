"""The learning rate is a function of the step."""

import pytest

from medalign.config import TrainConfig
from medalign.training.schedule import decays, factor, rates


def test_linear_rise_then_cosine_to_zero():
    config = TrainConfig(steps=100, warmup=0.1)
    assert [factor(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10, config) == 1.0
    assert factor(55, config) == pytest.approx(0.5)
    assert 0 < factor(99, config) < 0.001


def test_no_warmup_starts_at_the_peak():
    assert factor(0, TrainConfig(steps=10, warmup=0.0)) == 1.0


def test_groups_have_their_own_rate_and_decay():
    config = TrainConfig(steps=10, warmup=0.0, lr=1.0, projector_lr=0.1, weight_decay=0.2)
    assert rates(0, config) == {"adapters": 1.0, "mixture": 1.0, "steering": 1.0, "projector": 0.1}
    assert decays(config) == {"adapters": 0.2, "mixture": 0.2, "steering": 0.0, "projector": 0.2}
