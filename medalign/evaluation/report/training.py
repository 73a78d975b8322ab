"""How the training of each run went, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from medalign.evaluation.report.runs import RunRecord


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a run's training. A value is None if the run did not log it."""

    run: RunRecord
    steps: int | None
    samples_per_second: float | None  # all speeds are medians over the rows
    tokens_per_second: float | None
    data_wait_share: float | None
    peak_gib: float | None  # of rank 0's GPU; of its process if it has none
    skipped: int | None  # bad samples that were replaced, over the entire run
    truncated: int | None  # texts truncated to the maximum length, over the entire run
    unreadable: int | None  # samples that could not be read in the evaluations

    @property
    def known(self) -> bool:
        """Whether the run logged any training step."""
        return self.steps is not None


def training_summary(run: RunRecord) -> TrainingSummary:
    """Summarize a run's training. Counts in its rows are totals since the start, so the last row is used."""

    def values(key: str) -> list[float]:
        return [row[key] for row in run.rows if row.get(key) is not None]

    def typical(key: str) -> float | None:
        return median(values(key)) if values(key) else None

    def total(key: str) -> int | None:
        return int(values(key)[-1]) if values(key) else None

    unread = [e.scores["unreadable"] for e in run.evaluations.values() if "unreadable" in e.scores]
    return TrainingSummary(
        run=run,
        steps=total("step"),
        samples_per_second=typical("speed/samples_per_second"),
        tokens_per_second=typical("speed/tokens_per_second"),
        data_wait_share=typical("speed/data_wait_share"),
        peak_gib=max(values("memory/gpu_peak_gib") or values("memory/cpu_peak_gib"), default=None),
        skipped=total("data/skipped"),
        truncated=total("data/truncated"),
        unreadable=sum(unread) if unread else None,
    )
