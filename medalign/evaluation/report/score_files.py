"""The score tables of a report as CSV and PNG."""

from __future__ import annotations

from collections.abc import Sequence

from medalign.evaluation.report.differences import Difference, Differences
from medalign.evaluation.report.downloads import Download, Value, csv_uri, png_uri, table_figure
from medalign.evaluation.report.tables import Cell, ScoreTable

_FIELDS = (
    *("arm", "score", "n", "seeds", "value", "low", "high", "sd_over_seeds", "chance"),
    *("difference", "difference_low", "difference_high", "p", "p_holm"),
)


def score_download(table: ScoreTable, group: str, places: Sequence[int], differences: Differences) -> Download:
    """Return one group of columns: as CSV with a line per arm and score, and as PNG in the form of the page.

    Args:
        table: the scores.
        group: name of the group.
        places: places of its columns.
        differences: the paired differences on the same data set.
    """
    lines: list[list[Value]] = []
    cells, strong = [], []
    for row, (arm, found) in enumerate(table.rows):
        shown = [arm.title]
        for place in places:
            cell, difference = found[place], differences.of(arm, table.columns[place].key)
            if cell.value is not None:
                lines.append([arm.title, table.columns[place].label, *_values(cell, difference)])
            if difference is not None and difference.holds:
                strong.append((row, len(shown)))
            shown.append(_text(cell, difference))
        cells.append(shown)
    name = f"scores-{group.lower().replace(' ', '-')}"
    header = ["", *(f"{table.columns[place].label}\nn = {table.counts(place)}" for place in places)]
    return Download(name, csv_uri(_FIELDS, lines), png_uri(table_figure(header, cells, strong)))


def _values(cell: Cell, difference: Difference | None) -> list[Value]:
    own: list[Value] = [cell.count, cell.seeds, cell.value, cell.low, cell.high, cell.spread, cell.chance]
    if difference is None:
        return [*own, *[None] * 5]
    return [*own, difference.value, *difference.interval, difference.comparison.p, difference.comparison.p_holm]


def _text(cell: Cell, difference: Difference | None) -> str:
    if cell.value is None:
        return "\N{EN DASH}"
    spread = f" \N{PLUS-MINUS SIGN} {cell.spread:.1f}" if cell.spread is not None else ""
    beside = f"\n{difference.text}" if difference is not None else ""
    return f"{cell.value:.1f}{spread}{beside}"
