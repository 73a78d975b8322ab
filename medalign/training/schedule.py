"""The length of a run, and the learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from medalign.config import Config, TrainConfig


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
    """One line: how many steps, and how often each sample comes (folders mixed by weight have no epoch)."""
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


def factor(step: int, config: TrainConfig) -> float:
    """What step number `step` (from 0) multiplies its peak rate by: a linear rise, then half a cosine to 0."""
    steps = total_steps(config)
    warmup = warmup_steps(config)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def rates(step: int, config: TrainConfig) -> dict[str, float]:
    """The learning rate of each parameter group at a step."""
    now = factor(step, config)
    return {group: peak * now for group, peak in peaks(config).items()}


def peaks(config: TrainConfig) -> dict[str, float]:
    """The highest rate of each parameter group."""
    return {"adapters": config.lr, "mixture": config.lr, "steering": config.lr, "projector": config.projector_lr}


def decays(config: TrainConfig) -> dict[str, float]:
    """Weight decay of each parameter group. W starts at zero and is never pulled back to it."""
    decay = config.weight_decay
    return {"adapters": decay, "mixture": decay, "steering": 0.0, "projector": decay}
