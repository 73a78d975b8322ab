"""Score tables and training summaries of runs, for the page, the terminal and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from medalign.evaluation.report.runs import RunRecord


@dataclass(frozen=True)
class Column:
    """One score: its keys in scores.json, and how it is shown."""

    key: str
    label: str
    count: str  # key of the number of samples
    scale: float = 100.0  # fractions are shown in percent
    chance: str = ""  # key of the score without the image
    chance_label: str = ""
    ranked: bool = True  # whether the best run is marked


COLUMNS = (
    Column("closed_accuracy", "closed accuracy", "closed_n", chance="closed_majority", chance_label="majority answer"),
    Column("open_recall", "open recall", "open_n"),
    Column("open_exact", "open exact", "open_n"),
    Column("bleu", "BLEU", "report_n", scale=1.0),
    Column("rouge_l", "ROUGE-L", "report_n"),
    Column("attention_inside", "attention inside", "grounding_n", chance="box_area", chance_label="area"),
    Column("pointing_hits", "pointing hits", "pointing_n", chance="pointing_chance", chance_label="random patch"),
    Column("asked_denser", "asked denser", "conditional_n", chance="asked_denser_chance", chance_label="same map"),
    Column("asked_pointing", "asked pointing", "conditional_n", chance="other_pointing", chance_label="other question"),
    Column(
        "map_change", "map change", "conditional_n", chance="map_change_same", chance_label="same boxes", ranked=False
    ),
)
# Settings of an evaluation that must be equal for its scores to be comparable with those of another one.
COMPARED = ("max_new_tokens", "max_length", "limit", "answers_signature", "bleu_signature", "rouge_l_signature")


@dataclass(frozen=True)
class Cell:
    """One score of one run, in the unit of the table; None if the run has no such samples."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    count: int = 0
    best: bool = False

    @property
    def lift(self) -> float | None:
        """Ratio of the score and its chance level."""
        return self.value / self.chance if self.value is not None and self.chance else None


@dataclass(frozen=True)
class ScoreTable:
    """Scores on one data set: a column per score that any run has, and a row of cells per run."""

    name: str
    columns: list[Column]
    rows: list[tuple[RunRecord, list[Cell]]]

    def counts(self, column: int) -> str:
        """Return the number of samples of a column, or its range over the runs."""
        counts = sorted({cells[column].count for _, cells in self.rows if cells[column].value is not None})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    @property
    def longest_answer(self) -> str:
        """The limit of new tokens, or the limits if the runs differ; "" if no run contains it."""
        scores = [run.evaluations[self.name].scores for run, _ in self.rows]
        known = {one["max_new_tokens"] for one in scores if "max_new_tokens" in one}
        return " or ".join(map(str, sorted(known)))

    def remarks(self) -> list[str]:
        """Return remarks on the scores: samples that a run's scores omit, and settings in which the runs differ."""
        single = len(self.rows) == 1
        lines = []
        for run, _ in self.rows:
            found = remarks(run.evaluations[self.name].scores)
            lines += found if single else [f"{run.title}: {line}" for line in found]
        return lines + self._differences()

    def _differences(self) -> list[str]:
        lines = []
        for key in COMPARED:
            scores = {run.title: run.evaluations[self.name].scores for run, _ in self.rows}
            values = {title: one[key] for title, one in scores.items() if key in one}  # older files do not contain it
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{title} {value}" for title, value in values.items())
                lines.append(f"{key} differs, so the scores cannot be compared: {listed}")
        return lines

    def chance(self, column: int) -> float | None:
        """Return the chance level of a column, or None if the runs differ."""
        values = {round(c.chance, 9) for _, cells in self.rows if (c := cells[column]).chance is not None}
        return values.pop() if len(values) == 1 else None


def score_table(runs: Sequence[RunRecord], name: str) -> ScoreTable:
    """Build the table of one data set. The best value of a column is marked if the runs differ.

    Args:
        runs: the runs; those that were not evaluated on the data set are omitted.
        name: the data set.
    """
    scored = [(run, run.evaluations[name].scores) for run in runs if name in run.evaluations]
    columns = [column for column in COLUMNS if any(column.key in scores for _, scores in scored)]
    best = {}
    for column in columns:
        values = [scores[column.key] for _, scores in scored if column.key in scores]
        if len(set(values)) > 1 and column.ranked:
            best[column.key] = max(values)
    rows = [(run, [_cell(scores, column, best.get(column.key)) for column in columns]) for run, scores in scored]
    return ScoreTable(name, columns, rows)


def _cell(scores: dict[str, Any], column: Column, best: float | None) -> Cell:
    def shown(key: str) -> float | None:
        return scores[key] * column.scale if scores.get(key) is not None else None

    if column.key not in scores:
        return Cell()
    return Cell(
        value=shown(column.key),
        low=shown(f"{column.key}_low"),
        high=shown(f"{column.key}_high"),
        chance=shown(column.chance) if column.chance else None,
        count=scores.get(column.count, 0),
        best=scores[column.key] == best,
    )


def format_score_table(table: ScoreTable) -> str:
    """Format a table as text with aligned columns.

    Scores are in percent (BLEU in points). A star marks the best score of a column. The last row is the chance level;
    where the runs have different ones, each stands behind its score in parentheses.
    """
    head = [table.name, *(column.label for column in table.columns)]
    counts = ["", *(f"n {table.counts(i)}" for i in range(len(table.columns)))]
    lines = [head, counts]
    chances = [table.chance(i) for i in range(len(table.columns))]
    for run, cells in table.rows:
        lines.append([run.title, *(_text(cell, common) for cell, common in zip(cells, chances, strict=True))])
    if any(chance is not None for chance in chances):
        lines.append(["(chance)", *("" if chance is None else f"{chance:.1f}" for chance in chances)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def _text(cell: Cell, common_chance: float | None) -> str:
    if cell.value is None:
        return "-"
    own = f" ({cell.chance:.1f})" if common_chance is None and cell.chance is not None else ""
    return f"{'*' * cell.best}{cell.value:.1f}{own}"


def remarks(scores: dict[str, Any]) -> list[str]:
    """Return remarks on the scores of one run: answers that were cut off or empty, samples that no score includes."""
    n, unreadable = scores["n"], scores.get("unreadable", 0)
    texts = {
        "unreadable": f"of {n + unreadable} samples could not be read; no score includes them",
        "truncated": f"of {n} questions were truncated to {scores.get('max_length')} tokens (--max-length)",
        "answers_cut": f"of {n} answers were cut off at {scores.get('max_new_tokens')} tokens (--max-new-tokens)",
        "answers_empty": f"of {n} answers are empty",
        "without_image": f"of {n} samples have no image; attention scores do not include them",
        "ungrounded": f"of {n} samples have only boxes outside their image; attention scores do not include them",
        "duplicates": f"of {n} samples have the same key, question and answer as one in another folder; both count",
    }
    lines = [f"{scores[key]} {text}" for key, text in texts.items() if scores.get(key)]
    if scores.get("limit") is not None and scores["limit"] < scores["samples"]:
        lines.append(f"only the first {scores['limit']} of {scores['samples']} samples were evaluated (--limit)")
    return lines


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
