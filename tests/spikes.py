"""A loss term that is NaN for chosen samples: `losses.extra: [tests.spikes.spike]`, keys in SPIKE_KEYS (JSON)."""

from __future__ import annotations

import json
import os

import torch

from medalign.config import Config
from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets
from medalign.losses import LossTerm


class Spike(LossTerm):
    """Zero for all other samples."""

    def __init__(self, keys: set[str]) -> None:
        super().__init__("spike", 1.0)
        self.keys = keys

    def count(self, batch: Batch) -> torch.Tensor:
        return torch.ones((), device=batch.input_ids.device)

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue:
        factor = torch.nan if self.keys.intersection(batch.keys) else 0.0
        return LossValue(sum=output.logits.float().sum() * factor, count=self.count(batch))


def spike(config: Config) -> LossTerm:
    """What `losses.extra` names."""
    return Spike(set(json.loads(os.environ["SPIKE_KEYS"])))
