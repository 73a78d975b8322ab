"""The tables and figures of a report as files: CSV and PNG in links that work without a network."""

from __future__ import annotations

import base64
import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

Value = str | int | float | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute
_COLORS = 48  # of a PNG: text and thin lines need no more
_INCHES = 0.088  # width of a character of a table
_LINE = 0.24  # height of a line of a table in inches
_WRAP = 40  # characters of a line in a cell
_DPI, _PIXELS = 160, 20_000  # resolution, and the largest side of a PNG


@dataclass(frozen=True)
class Download:
    """The files of one table or figure."""

    name: str  # without suffix
    csv: str  # data URI
    png: str  # data URI


def table_download(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Download:
    """Return a table of text as CSV and PNG."""
    return Download(name, csv_uri(header, rows), png_uri(table_figure(header, rows)))


def csv_uri(header: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    """Return a CSV file as a data URI. Text that a spreadsheet would take as a formula begins with an apostrophe.

    Args:
        header: names of the columns.
        rows: numbers keep all their digits, None is an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(map(_safe, header))
    writer.writerows([_safe(value) for value in row] for row in rows)
    return _uri("text/csv;charset=utf-8", b"\xef\xbb\xbf" + text.getvalue().encode())  # with the mark that Excel needs


def _safe(value: Value) -> Value:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def png_uri(figure: Figure) -> str:
    """Return a figure as a PNG in a data URI."""
    drawn, small = io.BytesIO(), io.BytesIO()
    dpi = min(_DPI, _PIXELS / max(figure.get_size_inches()))
    figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    Image.open(drawn, formats=["PNG"]).convert("RGB").quantize(_COLORS).save(small, "PNG", optimize=True)
    return _uri("image/png", small.getvalue())


def table_figure(
    header: Sequence[str], rows: Sequence[Sequence[str]], strong: Iterable[tuple[int, int]] = ()
) -> Figure:
    """Draw a table on white: the first column to the left, the others to the right.

    Args:
        header: names of the columns.
        rows: the cells as text, which is drawn as it is.
        strong: row and column of the cells in bold.
    """
    lines = [[_wrapped(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(part) for line in lines for part in line[i].split("\n")) + 3 for i in range(len(header))]
    heights = [max(cell.count("\n") for cell in line) + 1.6 for line in lines]
    bold = {(row + 1, column) for row, column in strong} | {(0, column) for column in range(len(header))}
    with matplotlib.rc_context({"font.size": 9.0}):
        figure = Figure(figsize=(sum(widths) * _INCHES, sum(heights) * _LINE), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, sum(widths)), ylim=(sum(heights), 0))
        axes.set_axis_off()
        for row, line in enumerate(lines):
            top = sum(heights[:row])
            if row:
                axes.axhline(top, color="#c9d1d9", linewidth=0.8)
            for column, text in enumerate(line):
                axes.text(
                    1.5 if column == 0 else sum(widths[: column + 1]) - 1.5,
                    top + heights[row] / 2,
                    text,
                    ha="left" if column == 0 else "right",
                    va="center",
                    weight="bold" if (row, column) in bold else "normal",
                    parse_math=False,  # a "$" in a name is not a formula
                )
    return figure


def _wrapped(text: str) -> str:
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, _WRAP) or [""])


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
