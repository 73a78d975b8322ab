"""The length of a run; the learning rate is a function of the step."""

import math
from dataclasses import replace

import pytest

from medalign.config import Config, DataConfig, OptimizerConfig, TrainConfig
from medalign.training.schedule import decays, describe_length, factor, rates, resolve_steps


def settings(schedule="cosine", min_lr_ratio=0.0, **train):
    return Config(train=TrainConfig(**train), optimizer=OptimizerConfig(schedule=schedule, min_lr_ratio=min_lr_ratio))


def test_linear_rise_then_cosine_to_zero():
    config = settings(steps=100, warmup_ratio=0.1)
    assert [factor(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10, config) == 1.0
    assert factor(55, config) == pytest.approx(0.5)
    assert 0 < factor(99, config) < 0.001


def test_no_warmup_starts_at_the_peak():
    assert factor(0, settings(steps=10, warmup_ratio=0.0)) == 1.0


@pytest.mark.parametrize("minimum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("cosine", lambda t, low: low + (1 - low) * (1 + math.cos(math.pi * t)) / 2),
        ("linear", lambda t, low: 1 - t * (1 - low)),
        ("constant", lambda t, low: 1.0),
    ],
)
def test_a_schedule_follows_its_formula(schedule, formula, minimum):
    config = settings(schedule, minimum, steps=50, warmup_ratio=None, warmup_steps=10)
    found = [factor(step, config) for step in range(50)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:] == pytest.approx([formula(step / 40, minimum) for step in range(40)])


def test_the_defaults_are_the_cosine_to_zero_to_the_last_bit():
    config = Config(train=TrainConfig(steps=505))
    warmup = math.ceil(0.03 * 505)
    cosine = [0.5 * (1 + math.cos(math.pi * ((step - warmup) / (505 - warmup)))) for step in range(warmup, 505)]
    assert [factor(step, config) for step in range(warmup, 505)] == cosine


def test_groups_have_their_own_rate_and_decay():
    config = settings(steps=10, warmup_ratio=0.0, lr=1.0, projector_lr=0.1, vision_tower_lr=0.01, weight_decay=0.2)
    language = {"adapters": 1.0, "language_model": 1.0, "mixture": 1.0, "steering": 1.0}
    assert rates(0, config) == language | {"projector": 0.1, "vision_tower": 0.01}
    assert decays(config.train) == {name: 0.2 * (name != "steering") for name in rates(0, config)}


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [
        (1.0, 64, 32, 2),
        (9.0, 1797, 32, 505),  # 505.4
        (1.0, 80, 32, 3),  # 2.5: halves up
        (3.0, 16, 32, 2),  # 1.5
        (0.01, 7, 32, 1),  # never none
        (0.1, 640, 64, 1),
        (2.0, 3 * 10**15 + 1, 2, 3 * 10**15 + 1),  # beyond the digits of a float
    ],
)
def test_epochs_become_the_nearest_number_of_steps(epochs, samples, batch, steps):
    config = Config(train=TrainConfig(steps=None, epochs=epochs, batch_size=batch))
    resolved = resolve_steps(config, samples)
    assert resolved.train.steps == steps and resolved.train.epochs == epochs
    assert config.train.steps is None


def test_steps_are_left_alone_and_told_as_epochs():
    config = Config(train=TrainConfig(steps=10, batch_size=32))
    assert resolve_steps(config, 128) is config
    assert describe_length(config, 128) == "10 steps of 32 samples: 2.5 epochs of 128 samples"
    mixed = replace(config, data=DataConfig(train=["a", "b"], weights=[1.0, 2.0]))
    assert describe_length(mixed, 128) == "10 steps of 32 samples"  # folders mixed by weight have no common epoch
