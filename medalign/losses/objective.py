"""The training loss: `L = sum of coefficient * term`; the paper's is `L_LM + alpha L_vis + beta L_att`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from medalign.contracts import Batch, LossReport, StudentOutput, TeacherTargets
from medalign.losses.term import LossTerm


class Objective:
    """A weighted sum of terms.

    Args:
        terms: the terms, in the order in which they are added.

    Raises:
        ValueError: two terms have the same name, or all coefficients are 0.
    """

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        repeated = [name for name, times in Counter(term.name for term in terms).items() if times > 1]
        if repeated:
            raise ValueError(f"Objective: several loss terms are named {', '.join(repeated)}; give each its own name")
        if not any(term.coefficient > 0 for term in terms):
            raise ValueError("Objective: all coefficients of the loss terms are 0, so there is nothing to train")
        self.terms = tuple(terms)

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficient of each term, by name."""
        return {term.name: term.coefficient for term in self.terms}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the count of each term by name, float32 scalars.

        The counts depend only on the batch, so that all ranks can sum them before the forward pass.
        """
        return {term.name: term.count(batch) for term in self.terms}

    def __call__(
        self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch, scale: Mapping[str, float]
    ) -> LossReport:
        """Compute the terms of a micro-batch, and `total = sum of coefficient * scale[name] * term.sum`.

        A term with coefficient 0 is computed without gradient; if one of its inputs is missing, it is omitted.

        Args:
            output: the student's output for `batch`.
            targets: the teacher's output; None if nothing is distilled.
            batch: the micro-batch.
            scale: for each term, 1 / its count in the global batch, times the divisor of the caller's reduction over
                ranks and micro-batches.

        Raises:
            ValueError: an input of a term with a coefficient above 0 is missing.
        """
        values = {}
        parts = []
        for term in self.terms:
            trained = term.coefficient > 0
            with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
                value = term.compute(output, targets, batch)
            if value is not None:
                values[term.name] = value
                if trained:
                    parts.append(term.coefficient * scale[term.name] * value.sum)
            elif trained:
                missing = "teacher targets" if targets is None else "captured values of the student"
                raise ValueError(
                    f"Objective: {term.name} has coefficient {term.coefficient}, but there are no {missing}"
                )
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return LossReport(terms=values, total=total)
