"""One optimizer step: micro-batches in, one update, the loss of the whole global batch out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medalign import distributed
from medalign.contracts import Batch, LossReport
from medalign.engine.engine import Engine
from medalign.errors import MedAlignError
from medalign.geometry import PatchGrid
from medalign.losses.objective import Objective
from medalign.teacher.clip import Teacher
from medalign.teacher.targets import AsyncTeacher

_FAULTS = "faults"  # ranks without micro-batches, counted beside the terms


class TrainStep:
    """Teacher, student and losses put together.

    Args:
        engine: the student, sharded.
        teacher: frozen, on this rank; None when nothing is distilled.
        objective: the weighted losses.
        grid: the student's image tokens.
    """

    def __init__(self, engine: Engine, teacher: Teacher | None, objective: Objective, grid: PatchGrid) -> None:
        self.engine = engine
        self.teacher = teacher
        self.objective = objective
        self.grid = grid
        self.async_teacher = None if teacher is None else AsyncTeacher(teacher, grid, engine.device)

    def __call__(
        self, micro_batches: Sequence[Batch], rates: dict[str, float], fault: MedAlignError | None = None
    ) -> dict[str, float]:
        """Update once. Returns the loss terms as means over the global batch, and the gradient's norm.

        `fault` says why this rank has no micro-batches; every rank raises it, before the first forward pass.
        """
        batches = [batch.to(self.engine.device) for batch in micro_batches]
        totals = self._totals(batches, fault)
        # The engine takes the mean over ranks and micro-batches; this undoes it.
        share = distributed.world_size() * len(batches)
        scale = {name: share / max(total, 1.0) for name, total in totals.items()}
        reports = []
        for batch in batches:
            report = self._forward(batch, scale)
            self.engine.backward(report.total)
            norm = self.engine.step(rates)
            reports.append({name: term.sum.detach() for name, term in report.terms.items()})
        sums = distributed.sum_over_ranks(_add(reports))
        means = {name: float(value) / max(totals[name], 1.0) for name, value in sums.items()}
        total = sum(self.objective.coefficient(name) * mean for name, mean in means.items())
        return {f"loss/{name}": mean for name, mean in means.items()} | {"loss/total": total, "optim/grad_norm": norm}

    def _totals(self, batches: Sequence[Batch], fault: MedAlignError | None) -> dict[str, float]:
        """The count of every term over the global batch; raises where a rank has a fault instead of batches.

        The counts are known before the first forward pass, so each loss is a mean over the global batch however it is
        cut into ranks and micro-batches.
        """
        none = torch.zeros((), device=self.engine.device)
        counts = [self.objective.counts(batch) for batch in batches]
        row = _add(counts) if counts else dict.fromkeys(self.objective.coefficients, none)
        sums = distributed.sum_over_ranks(row | {_FAULTS: none + (fault is not None)})
        totals = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))  # one wait for the device
        if totals.pop(_FAULTS):
            distributed.raise_on_any_fault(fault)
        return totals

    def _forward(self, batch: Batch, scale: dict[str, float]) -> LossReport:
        targets = self.async_teacher.submit(batch.teacher_pixels) if self.async_teacher else None
        output = self.engine(batch, tap=targets is not None)
        return self.objective(output, targets.result() if targets else None, batch, scale)


def _add(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name].float() for row in rows]).sum() for name in rows[0]}
