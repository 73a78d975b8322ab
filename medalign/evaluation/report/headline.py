"""The title of a report: what was found, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from medalign.evaluation.report.columns import Column
from medalign.evaluation.report.differences import Difference, Differences
from medalign.evaluation.report.tables import ScoreTable

_LISTED = 4  # arms whose scores are in the title


def headline(table: ScoreTable, differences: Differences) -> str:
    """Return the finding in the first column of a table: all questions, or else the first score that was measured.

    Only a difference that holds puts an arm above or below the baseline.

    Args:
        table: the scores on one data set.
        differences: the paired differences on it.
    """
    if not table.columns:
        return "No score"
    column = table.columns[0]
    found = {arm.title: one for arm, _ in table.rows if (one := differences.of(arm, column.key))}
    if not found:
        return _scores(table, column)
    holding = [(title, one) for title, one in found.items() if one.holds]
    if not holding:
        return _undecided(found, differences.baseline, column)
    rest = len(found) - len(holding)
    others = [f"for {rest} other arm{'s' if rest > 1 else ''} no difference holds"] if rest else []
    return "; ".join([*_apart(holding, differences.baseline, column), *others])


def details(table: ScoreTable, differences: Differences) -> str:
    """Return the numbers behind the headline: the score of each arm, its difference, and how that was tested."""
    if not table.columns:
        return f"On {table.name}."
    column = table.columns[0]
    parts = []
    for arm, cells in table.rows:
        value, difference = cells[0].value, differences.of(arm, column.key)
        beside = f" ({difference.text})" if difference is not None else ""
        parts.append(f"{arm.title} {'not measured' if value is None else f'{value:.1f}'}{beside}")
    method = f" Differences: {differences.method}." if differences.method else ""
    why = " The notes below the scores say what is not compared, and why." if differences.problems else ""
    return f"On {table.name}, {column.subject}: {', '.join(parts)}.{method}{why}"


def _scores(table: ScoreTable, column: Column) -> str:
    unit = " %" if column.scale == 100.0 else ""
    values = [(arm.title, cells[0].value) for arm, cells in table.rows]
    if len(values) > _LISTED:
        return f"{len(values)} arms, not compared"
    listed = ", ".join(
        f"{title} \N{EN DASH}" if value is None else f"{title} {value:.1f}{unit}" for title, value in values
    )
    subject = column.subject[0].upper() + column.subject[1:]
    return f"{subject}: {listed}{', not compared' if len(values) > 1 else ''}"


def _apart(holding: Sequence[tuple[str, Difference]], baseline: str, column: Column) -> list[str]:
    """Return one clause for the arms above the baseline, and one for those below it."""
    clauses = []
    for word, sign in (("above", 1), ("below", -1)):
        side = [(title, one) for title, one in holding if one.value * sign > 0]
        if len(side) == 1:
            clauses.append(f"{side[0][0]} is {abs(side[0][1].value):.1f} points {word} {baseline} in {column.subject}")
        elif side:
            listed = ", ".join(f"{title} ({one.text})" for title, one in side)
            clauses.append(f"{listed} are {word} {baseline} in {column.subject}")
    return clauses


def _undecided(found: dict[str, Difference], baseline: str, column: Column) -> str:
    if len(found) == 1:
        return f"No difference between {next(iter(found))} and {baseline} holds in {column.subject}"
    return f"None of {len(found)} arms differs from {baseline} in {column.subject} beyond chance"
