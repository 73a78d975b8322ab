"""The length of a run, and the learning rate as a function of the step. There is no state to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

from medalign.config import Config, TrainConfig
from medalign.config.schema.training import LearningRateSchedule


def resolve_steps(config: Config, samples: int) -> Config:
    """The same settings with `train.steps` set, for `samples` training samples; every rank gets the same number.

    Steps are epochs * samples / batch_size, rounded to the nearest whole number (halves up), at least 1: no more than
    half a batch away from the epochs that were asked for.
    """
    train = config.train
    if train.epochs is None:
        return config
    exact = Fraction(train.epochs) * samples / train.batch_size
    return replace(config, train=replace(train, steps=max(1, math.floor(exact + Fraction(1, 2)))))


def total_steps(config: TrainConfig) -> int:
    """Steps of the whole run, after `resolve_steps`."""
    assert config.steps is not None, "train.epochs must be resolved into steps first"
    return config.steps


def describe_length(config: Config, samples: int) -> str:
    """One line: the number of steps, and of epochs (folders mixed by weight have none)."""
    train = config.train
    steps = total_steps(train)
    text = f"{steps} steps of {train.batch_size} samples"
    if config.data.weights or not samples:
        return text
    return f"{text}: {steps * train.batch_size / samples:.4g} epochs of {samples} samples"


def warmup_steps(config: TrainConfig) -> int:
    """Steps over which the learning rate rises, after `resolve_steps`."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    assert config.warmup_ratio is not None, "train.warmup_ratio or train.warmup_steps must be set"
    return math.ceil(config.warmup_ratio * total_steps(config))


def factor(step: int, config: Config) -> float:
    """What the peak learning rates are multiplied by.

    Args:
        step: index of the step, from 0.
        config: the settings, after `resolve_steps`.

    Returns:
        A number in (0, 1]: a linear rise over the warm-up, then `optimizer.schedule` down to `optimizer.min_lr_ratio`.
    """
    steps, warmup = total_steps(config.train), warmup_steps(config.train)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.optimizer.min_lr_ratio
    return floor + (1 - floor) * _SHAPES[config.optimizer.schedule](progress)


_SHAPES: Mapping[LearningRateSchedule, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""From 1 to 0, as a function of the share of the steps after the warm-up."""


def rates(step: int, config: Config) -> dict[str, float]:
    """The learning rate of each parameter group at a step."""
    now = factor(step, config)
    return {group: peak * now for group, peak in peaks(config.train).items()}


def peaks(config: TrainConfig) -> dict[str, float]:
    """The peak learning rate of each parameter group."""
    groups = dict.fromkeys(("adapters", "mixture", "steering", "language_model"), config.lr)
    return groups | {"projector": config.projector_lr, "vision_tower": config.vision_tower_lr}


def decays(config: TrainConfig) -> dict[str, float]:
    """The weight decay of the matrices of each parameter group. W starts at zero and does not decay toward it."""
    return dict.fromkeys(peaks(config), config.weight_decay) | {"steering": 0.0}
