"""Score tables of arms, for the page, the terminal and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from medalign.evaluation.report.columns import COLUMNS, Column
from medalign.evaluation.report.runs import Arm, Evaluation

# Settings of an evaluation that must be equal for its scores to be comparable with those of another one.
COMPARED = ("max_new_tokens", "max_length", "limit", "answers_signature", "bleu_signature", "rouge_l_signature")


@dataclass(frozen=True)
class Cell:
    """One score of one arm, in the unit of the table; None if the arm has no such samples.

    Attributes:
        value: the score, or its mean over the seeds.
        low: lower end of its interval over the samples; None for several seeds.
        high: upper end.
        spread: standard deviation over the seeds; None for one.
        seeds: number of runs with this score.
        chance: the score without the image, or its mean over the seeds.
        count: number of samples of one run.
        best: whether no other arm has a higher score.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    seeds: int = 0
    chance: float | None = None
    count: int = 0
    best: bool = False

    @property
    def lift(self) -> float | None:
        """Ratio of the score and its chance level."""
        return self.value / self.chance if self.value is not None and self.chance else None


@dataclass(frozen=True)
class ScoreTable:
    """Scores on one data set: a column per score that any arm has, and a row of cells per arm."""

    name: str
    columns: list[Column]
    rows: list[tuple[Arm, list[Cell]]]

    def groups(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the name of each group of columns with the places of its columns."""
        for group in dict.fromkeys(column.group for column in self.columns):
            yield group, [place for place, column in enumerate(self.columns) if column.group == group]

    def counts(self, column: int) -> str:
        """Return the number of samples of a column, or its range over the arms."""
        counts = sorted({cells[column].count for _, cells in self.rows if cells[column].value is not None})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    @property
    def longest_answer(self) -> str:
        """The limit of new tokens, or the limits if the runs differ; "" if no run contains it."""
        known = {one.scores["max_new_tokens"] for _, one in self._evaluations() if "max_new_tokens" in one.scores}
        return " or ".join(map(str, sorted(known)))

    def remarks(self) -> list[str]:
        """Return remarks on the scores: samples that a run's scores omit, and settings in which the runs differ."""
        evaluations = list(self._evaluations())
        lines = []
        for title, evaluation in evaluations:
            found = remarks(evaluation.scores)
            lines += found if len(evaluations) == 1 else [f"{title}: {line}" for line in found]
        lines += [
            f"{arm.title}: only {len(arm.evaluations(self.name))} of {len(arm.runs)} seeds have this evaluation"
            for arm, _ in self.rows
            if len(arm.evaluations(self.name)) < len(arm.runs)
        ]
        return lines + self._differences()

    def _evaluations(self) -> Iterator[tuple[str, Evaluation]]:
        for arm, _ in self.rows:
            for run in arm.runs:
                if self.name in run.evaluations:
                    yield run.title, run.evaluations[self.name]

    def _differences(self) -> list[str]:
        lines = []
        for key in COMPARED:
            # older files do not contain it
            values = {title: one.scores[key] for title, one in self._evaluations() if key in one.scores}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{title} {value}" for title, value in values.items())
                lines.append(f"{key} differs, so the scores cannot be compared: {listed}")
        return lines

    def chance(self, column: int) -> float | None:
        """Return the chance level of a column, or None if the arms differ."""
        values = {round(c.chance, 9) for _, cells in self.rows if (c := cells[column]).chance is not None}
        return values.pop() if len(values) == 1 else None


def score_table(arms: Sequence[Arm], name: str, columns: Sequence[Column] = COLUMNS) -> ScoreTable:
    """Build the table of one data set. The best value of a column is marked if the arms differ.

    Args:
        arms: the arms; those that were not evaluated on the data set are omitted.
        name: the data set.
        columns: the scores; those that no arm has are omitted.
    """
    scored = [(arm, evaluations) for arm in arms if (evaluations := arm.evaluations(name))]
    found = {column: [_cell(column, evaluations) for _, evaluations in scored] for column in columns}
    shown = {
        column: _marked(column, cells)
        for column, cells in found.items()
        if any(cell.value is not None for cell in cells)
    }
    rows = [(arm, [cells[place] for cells in shown.values()]) for place, (arm, _) in enumerate(scored)]
    return ScoreTable(name, list(shown), rows)


def _marked(column: Column, cells: list[Cell]) -> list[Cell]:
    values = [cell.value for cell in cells if cell.value is not None]
    if not column.better or len(set(values)) < 2:
        return cells
    best = max(values) if column.better == "higher" else min(values)
    return [Cell(**{**vars(cell), "best": cell.value is not None and cell.value == best}) for cell in cells]


def _cell(column: Column, evaluations: Sequence[Evaluation]) -> Cell:
    having = [one for one in evaluations if column.score(one) is not None]
    values = [value for one in having if (value := column.score(one)) is not None]
    chances = [chance for one in having if (chance := column.by_chance(one)) is not None]
    if not values:
        return Cell()
    single = len(values) == 1
    return Cell(
        value=values[0] if single else fmean(values),
        low=column.score(having[0], "_low") if single else None,
        high=column.score(having[0], "_high") if single else None,
        spread=None if single else stdev(values),
        seeds=len(values),
        chance=(chances[0] if single else fmean(chances)) if chances else None,
        count=column.read(having[0], column.count) or 0,
    )


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
