"""The interface of the terms of the training loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets

RESERVED = ("total",)  # `loss/total` is the weighted sum of all terms


class LossTerm(ABC):
    """One term of the training loss: its name, its coefficient, its count and its value.

    The loss of a step is the term's sum over the global batch divided by its count over the global batch. It therefore
    does not depend on how the batch is divided among ranks and micro-batches.

    Args:
        name: unique among the terms of an objective; the term is logged as `loss/NAME`.
        coefficient: factor of the term in the total. A term with coefficient 0 is logged, but not trained.

    Raises:
        ValueError: the coefficient is negative, or the name is reserved.
    """

    def __init__(self, name: str, coefficient: float) -> None:
        if name in RESERVED:
            raise ValueError(f"loss term {name!r}: the name is reserved; choose another one")
        if not coefficient >= 0:
            raise ValueError(f"loss term {name!r}: coefficient {coefficient} must not be negative")
        self.name = name
        self.coefficient = coefficient

    @abstractmethod
    def count(self, batch: Batch) -> torch.Tensor:
        """Return the term's divisor for one micro-batch, a float32 scalar on the batch's device.

        It is called before the forward pass, so that the counts of all ranks and micro-batches can be summed first.
        """

    @abstractmethod
    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Compute the sum over a micro-batch, not divided by the count, and the count.

        Images of weight 0 must stay in the graph with gradient zero, because every rank runs the same backward pass
        under ZeRO-3. For the same reason, whether the result is None must not depend on the data.

        Args:
            output: the student's output for `batch`.
            targets: the teacher's output; None if nothing is distilled.
            batch: the micro-batch.

        Returns:
            The value, or None if an input is missing.
        """


def mean_over_blocks(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of a loss over the tapped blocks.

    Args:
        values: the loss of each tapped block.
        weights: one weight per block; empty if all are equal.

    Raises:
        ValueError: there is not one weight per block.
    """
    if weights and len(weights) != len(values):
        raise ValueError(f"{len(weights)} layer weights for {len(values)} tapped blocks; give one per block")
    if len(values) == 1:
        return values[0]
    chosen = torch.tensor(weights or [1.0] * len(values), dtype=values[0].dtype, device=values[0].device)
    return (torch.stack(list(values)) * (chosen / chosen.sum())).sum()


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if `value` of the argument `name` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f'{name}="{value}" is not one of {", ".join(choices)}')
