"""A loss term that is not part of the package: the z-loss, which keeps logits small."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medalign.config import Config
from medalign.contracts import IGNORE, Batch, LossValue, StudentOutput, TeacherTargets
from medalign.losses import LossTerm

COEFFICIENT = 0.01


class ZLoss(LossTerm):
    """The squared log of the softmax's denominator, as a mean over the supervised tokens."""

    def __init__(self, coefficient: float = COEFFICIENT) -> None:
        super().__init__("z_loss", coefficient)

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch.labels[:, 1:] != IGNORE).sum().float()

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue:
        supervised_BK = F.pad(batch.labels[:, 1:] != IGNORE, (0, 1))[:, output.kept]
        logits_TV = output.logits[supervised_BK].float()
        return LossValue(sum=logits_TV.logsumexp(-1).square().sum(), count=self.count(batch))


def z_loss(config: Config) -> LossTerm:
    """The factory for `losses.extra: [tests.own_loss.z_loss]`."""
    assert config.student.path
    return ZLoss()


def not_a_term(config: Config) -> int:
    return 3
