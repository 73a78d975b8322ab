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
        ValueError: two terms have the same name, or no term has a coefficient above 0.
    """

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        repeated = [name for name, times in Counter(term.name for term in terms).items() if times > 1]
        if repeated:
            raise ValueError(f"Objective: several loss terms are named {', '.join(repeated)}; give each its own name")
        if not any(term.coefficient > 0 for term in terms):
            raise ValueError("Objective: no loss term has a coefficient above 0, so there is nothing to train")
        self.terms = tuple(terms)

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficient of each term, by name."""
        return {term.name: term.coefficient for term in self.terms}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The count of each term, by name, from the batch only; float32 scalars.

        Known before the forward pass, so that all ranks can add them up first.
        """
        return {term.name: term.count(batch) for term in self.terms}

    def __call__(
        self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch, scale: Mapping[str, float]
    ) -> LossReport:
        """The terms of a micro-batch, and `total = sum of coefficient * scale[name] * term.sum`.

        A term with coefficient 0 is computed without gradient; where one of its inputs is missing, it is left out.

        Args:
            output: the student's output for `batch`.
            targets: the teacher's output; None when nothing is distilled.
            batch: the micro-batch.
            scale: for each term, one over its count in the global batch, times whatever the caller's reduction
                divides by.

        Raises:
            ValueError: a term has a coefficient above 0 and one of its inputs is missing.
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
