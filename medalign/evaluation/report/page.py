"""The report that compares runs: one self-contained HTML file, and its numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from medalign.errors import ConfigError
from medalign.evaluation.report.curves import SERIES, panels
from medalign.evaluation.report.examples import examples as choose_examples
from medalign.evaluation.report.runs import (
    config_differences,
    evaluation_names,
    read_evaluation,
    read_runs,
    read_scored,
)
from medalign.evaluation.report.tables import (
    ScoreTable,
    TrainingSummary,
    format_score_table,
    score_table,
    training_summary,
)
from medalign.observability.files import write_text

TEMPLATE = "report.html.jinja"


def write_report(runs: Sequence[Path], output: Path, *, titles: Sequence[str] | None = None, examples: int = 8) -> None:
    """Write an HTML report, and its numbers into a JSON file with the same name.

    The images are read from the shards. If the shards do not exist any more, the page reports that instead.

    Args:
        runs: folders of evaluated runs (config.yaml, metrics.jsonl, evaluation/NAME/), in the order of the report.
        output: the HTML file. The suffix of the JSON file is .json.
        titles: names of the runs in the report; by default the names of their folders.
        examples: number of example questions per data set.

    Raises:
        DataError: a folder contains no evaluation.
        ConfigError: `output` cannot be written, or the number of titles does not match the number of runs.
    """
    records = read_runs(runs, titles)
    names = evaluation_names(records)
    tables = [score_table(records, name) for name in names]
    summaries = [training_summary(record) for record in records]
    page = _template().render(
        runs=records,
        series={record.title: index % SERIES for index, record in enumerate(records)},
        tables=tables,
        panels=[(panel.title, Markup(panel.svg)) for panel in panels(records)],  # noqa: S704, the SVG is generated here
        summaries=summaries,
        examples=[choose_examples(records, name, examples) for name in names] if examples else [],
        differences=config_differences(records),
    )
    output = Path(output)
    data = json.dumps(as_data(tables, summaries), indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(output.with_suffix(".json"), data)
        write_text(output, page)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}); choose another file") from error


def format_table(runs: Sequence[Path], titles: Sequence[str] | None = None) -> str:
    """Return the score tables as text with aligned columns, one per data set, each followed by its remarks.

    Args:
        runs: folders of evaluated runs.
        titles: names of the runs; by default the names of their folders.
    """
    records = read_runs(runs, titles)
    return "\n\n".join(_as_lines(score_table(records, name)) for name in evaluation_names(records))


def format_evaluation(folder: Path) -> str:
    """Return the score table of one evaluation as text, followed by its remarks."""
    record = read_evaluation(folder)
    return _as_lines(score_table([record], folder.name))


def format_scored(paths: Sequence[Path]) -> str:
    """Return one score table of several files of scores as text, followed by its remarks."""
    return _as_lines(score_table(read_scored(paths), ""))


def _as_lines(table: ScoreTable) -> str:
    return "\n".join([format_score_table(table), *table.remarks()])


def as_data(tables: Sequence[ScoreTable], summaries: Sequence[TrainingSummary]) -> dict[str, Any]:
    """Return the numbers of the page: the scores of every run, as in scores.json, and the summary of its training."""
    return {
        "tables": [
            {
                "name": table.name,
                "rows": [{"run": run.title, **run.evaluations[table.name].scores} for run, _ in table.rows],
            }
            for table in tables
        ],
        "training": [{**vars(item), "run": item.run.title} for item in summaries],
    }


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _format_number
    return environment.from_string(resources.files("medalign.evaluation.report").joinpath(TEMPLATE).read_text("utf-8"))


def _format_number(value: float | None, digits: int = 1) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.{digits}f}"
