"""Score tables as text, for the terminal."""

from __future__ import annotations

from medalign.evaluation.report.tables import Cell, ScoreTable


def format_score_table(table: ScoreTable) -> str:
    """Format a table as text with aligned columns.

    Scores are in percent (BLEU in points), those of several seeds with their standard deviation. A star marks the best
    score of a column. The last row is the chance level; where the arms have different ones, each stands behind its
    score in parentheses.
    """
    head = [table.name, *(column.label for column in table.columns)]
    counts = ["", *(f"n {table.counts(i)}" for i in range(len(table.columns)))]
    lines = [head, counts]
    chances = [table.chance(i) for i in range(len(table.columns))]
    for arm, cells in table.rows:
        lines.append([arm.title, *(_text(cell, common) for cell, common in zip(cells, chances, strict=True))])
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
    spread = f" \N{PLUS-MINUS SIGN}{cell.spread:.1f}" if cell.spread is not None else ""
    own = f" ({cell.chance:.1f})" if common_chance is None and cell.chance is not None else ""
    return f"{'*' * cell.best}{cell.value:.1f}{spread}{own}"
