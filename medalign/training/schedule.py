"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from medalign.config import TrainConfig


def factor(step: int, config: TrainConfig) -> float:
    """What step number `step` (from 0) multiplies its peak rate by: a linear rise, then half a cosine to 0."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
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
