"""The norm of W, which is zero before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from medalign.training.trainer import Callback, Trainer


class SteeringNorm(Callback):
    """Adds `optim/steering_norm` to the rows. Attach it on every rank.

    Args:
        parameters: the parameters of W.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def metrics(self, trainer: Trainer) -> Mapping[str, float]:
        """Return the norm; it gathers W."""
        return {"optim/steering_norm": trainer.step.engine.norm(self._parameters)}
