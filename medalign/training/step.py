"""One optimizer step: micro-batches in, one update, the loss of the whole global batch out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from medalign import distributed
from medalign.contracts import Batch, LossReport, TeacherTargets
from medalign.engine.engine import Engine
from medalign.errors import MedAlignError
from medalign.geometry import PatchGrid
from medalign.losses.objective import Objective
from medalign.teacher.model import TargetSource
from medalign.teacher.sinks import SinkMonitor
from medalign.teacher.targets import AsyncTeacher

_FAULTS = "faults"  # ranks without micro-batches, counted beside the terms
_COUNT = "count/"  # before the name of a term: its count, summed beside its value


class BatchList(Protocol):
    """A known number of micro-batches, read one after the other."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class TrainStep:
    """Teacher, student and losses put together.

    Args:
        engine: the student, sharded.
        teacher: frozen, on this rank; None when nothing is distilled.
        objective: the weighted losses.
        grid: the student's image tokens.
        also: further teachers, in the order of `teacher.also`.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: TargetSource | None,
        objective: Objective,
        grid: PatchGrid,
        also: Sequence[TargetSource] = (),
    ) -> None:
        self.engine = engine
        self.teachers = (*([] if teacher is None else [teacher]), *also)
        self.objective = objective
        self.grid = grid
        self.async_teachers = [AsyncTeacher(each, grid, engine.device) for each in self.teachers]
        self.on_micro_batch: Callable[[], None] = lambda: None  # called after each micro-batch of a step
        monitored = range(len(self.teachers)) if distributed.is_main() else ()
        self.sink_monitors = [SinkMonitor(number) for number in monitored]

    def __call__(
        self,
        micro_batches: Sequence[Batch],
        rates: dict[str, float],
        fault: MedAlignError | None = None,
        loss_limit: float = math.inf,
    ) -> dict[str, float]:
        """Update once. Every rank must call it.

        Args:
            micro_batches: this rank's part of the global batch.
            rates: the learning rate of each parameter group.
            fault: why this rank has no micro-batches; every rank raises it, before the first forward pass.
            loss_limit: a step with a larger total loss updates nothing; its `optim/grad_norm` is infinite.

        Returns:
            `loss/NAME` of each term as a mean over the global batch, `loss/total`, and `optim/grad_norm`.
        """
        batches = [batch.to(self.engine.device) for batch in micro_batches]
        totals = self._totals(batches, fault)
        # The engine takes the mean over ranks and micro-batches; this undoes it.
        share = distributed.world_size() * len(batches)
        scale = {name: share / max(total, 1.0) for name, total in totals.items()}
        reports = []
        for index, batch in enumerate(batches, start=1):
            report = self._forward(batch, scale)
            reports.append({name: term.sum.detach() for name, term in report.terms.items()})
            loss = report.total
            if index == len(batches):
                metrics = self._reduce(reports, totals)
                if metrics["loss/total"] > loss_limit:
                    loss = loss * math.nan  # DeepSpeed leaves out the update of a gradient that is not finite
            self.engine.backward(loss)
            norm = self.engine.step(rates)
            self.on_micro_batch()
        return metrics | {"optim/grad_norm": norm}

    def _reduce(self, reports: Sequence[dict[str, torch.Tensor]], totals: Mapping[str, float]) -> dict[str, float]:
        """Return the means over the global batch. Every rank must call it."""
        sums = distributed.sum_over_ranks(_add(reports))
        return self._metrics({name: float(value) / max(totals[name], 1.0) for name, value in sums.items()})

    @torch.no_grad()
    def evaluate(self, batches: BatchList) -> dict[str, float]:
        """The loss terms as means over `batches` of all ranks, with teacher forcing and without dropout.

        Every rank must call it, with the same number of batches. What one rank raises while it reads a batch, all
        raise.

        Args:
            batches: this rank's micro-batches; iterated once.

        Returns:
            `loss/NAME` of each term, and `loss/total`; the same on every rank.
        """
        student, names = self.engine.student, list(self.objective.coefficients)
        rows: list[dict[str, torch.Tensor]] = []
        unread = iter(batches)
        student.eval()
        for _ in range(len(batches)):
            with distributed.raise_on_all_ranks():
                batch = next(unread).to(self.engine.device)
            report = self._forward(batch, dict.fromkeys(names, 1.0))
            rows.append(
                {name: term.sum.double() for name, term in report.terms.items()}
                | {f"{_COUNT}{name}": count.double() for name, count in self.objective.counts(batch).items()}
            )
        student.train()
        sums = distributed.sum_over_ranks({name: torch.stack([row[name] for row in rows]).sum() for name in rows[0]})
        means = {name: float(sums[name]) / max(float(sums[f"{_COUNT}{name}"]), 1.0) for name in names if name in sums}
        return self._metrics(means)

    def _metrics(self, means: dict[str, float]) -> dict[str, float]:
        coefficients = self.objective.coefficients
        total = sum(coefficients[name] * mean for name, mean in means.items())
        return {f"loss/{name}": mean for name, mean in means.items()} | {"loss/total": total}

    def _totals(self, batches: Sequence[Batch], fault: MedAlignError | None) -> dict[str, float]:
        """The count of every term over the global batch. Every rank must call it.

        The counts are known before the first forward pass, so each loss is a mean over the global batch however it is
        cut into ranks and micro-batches.

        Raises:
            MedAlignError: the fault of the first rank that has one instead of batches, on every rank.
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
        pending = [
            teacher.submit(inputs, batch.image_questions, batch.image_reports)
            for teacher, inputs in zip(self.async_teachers, batch.teachers if self.teachers else (), strict=True)
        ]
        output = self.engine(batch, tap=bool(pending))
        targets = _joined([each.result() for each in pending])
        if targets is not None:
            for number, monitor in enumerate(self.sink_monitors):
                monitor(targets.of(number), batch)
        return self.objective(output, targets, batch, scale)


def _joined(targets: Sequence[TeacherTargets]) -> TeacherTargets | None:
    """Return the targets of all teachers as one; None without a teacher."""
    return replace(targets[0], also=tuple(targets[1:])) if targets else None


def _add(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name].float() for row in rows]).sum() for name in rows[0]}
