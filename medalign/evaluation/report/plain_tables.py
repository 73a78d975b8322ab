"""The tables of a report that hold text: training, settings, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medalign.evaluation.report.downloads import Download, table_download
from medalign.evaluation.report.origin import Origin
from medalign.evaluation.report.runs import Arm, config_differences
from medalign.evaluation.report.training import TrainingSummary

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class PlainTable:
    """A table of text, whose first column names the rows.

    Attributes:
        label: what it shows, for a screen reader.
        header: names of the columns.
        rows: as many cells as the header has.
        download: the same as files.
        verbatim: whether the cells are values of settings, paths or commands.
    """

    label: str
    header: list[str]
    rows: list[list[str]]
    download: Download
    verbatim: bool = False


def training_table(summaries: Sequence[TrainingSummary]) -> PlainTable:
    """Return how the training of each run went."""
    header = ["run", "steps", "samples/s", "tokens/s", "waiting for data", "peak memory"]
    header += ["bad samples replaced", "texts truncated", "unreadable in evaluation"]
    rows = [
        [
            item.run.title,
            _number(item.steps, ",.0f"),
            _number(item.samples_per_second, ",.1f"),
            _number(item.tokens_per_second, ",.0f"),
            _number(item.data_wait_share, ".1%").replace("%", " %"),
            _number(item.peak_gib, ".2f GiB"),
            *(_number(count, ",.0f") for count in (item.skipped, item.truncated, item.unreadable)),
        ]
        for item in summaries
    ]
    return _table("training", "Training", header, rows)


def settings_table(arms: Sequence[Arm]) -> PlainTable | None:
    """Return the settings in which the arms differ; None without any."""
    rows = [[key, *(value or DASH for value in values)] for key, values in config_differences(arms)]
    header = ["setting", *(arm.title for arm in arms)]
    return _table("settings", "Settings that differ", header, rows, verbatim=True) if rows else None


def origin_table(found: Origin) -> PlainTable:
    """Return the facts in which the evaluations differ. The files have the common ones too."""
    names, values = [name for name, _ in found.common], [value for _, value in found.common]
    download = table_download(
        "provenance", ["run", *names, *found.labels], [[title, *values, *own] for title, own in found.rows]
    )
    rows = [[title, *own] for title, own in found.rows]
    return PlainTable("Provenance", ["run", *found.labels], rows, download, verbatim=True)


def _table(name: str, label: str, header: list[str], rows: list[list[str]], verbatim: bool = False) -> PlainTable:
    return PlainTable(label, header, rows, table_download(name, header, rows), verbatim)


def _number(value: float | None, form: str) -> str:
    form, mark, unit = form.partition(" ")
    return DASH if value is None else f"{value:{form}}{mark}{unit}"
