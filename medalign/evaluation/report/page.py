"""The report that compares runs: one self-contained HTML file, and its numbers as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medalign.errors import ConfigError
from medalign.evaluation.report import curves
from medalign.evaluation.report.columns import PAGE_COLUMNS
from medalign.evaluation.report.differences import Differences, find_differences
from medalign.evaluation.report.downloads import Download
from medalign.evaluation.report.examples import Examples, TeacherMaps, find_examples
from medalign.evaluation.report.headline import details, headline
from medalign.evaluation.report.origin import find_origin
from medalign.evaluation.report.plain_tables import origin_table, settings_table, training_table
from medalign.evaluation.report.runs import Arm, evaluation_names, read_arms, read_evaluation, read_scored
from medalign.evaluation.report.score_files import score_download
from medalign.evaluation.report.tables import ScoreTable, score_table
from medalign.evaluation.report.text_table import format_score_table
from medalign.evaluation.report.training import TrainingSummary, training_summary
from medalign.observability.files import write_text

TEMPLATE = "report.html.jinja"
SCRIPT = resources.files("medalign.evaluation.report").joinpath("report.js").read_text("utf-8")


@dataclass(frozen=True)
class Scored:
    """The scores on one data set, with the differences to the first arm and the files to take along."""

    table: ScoreTable
    differences: Differences
    groups: list[tuple[str, list[int], Download]]  # name, places of its columns, files


def write_report(
    words: Sequence[str | Path],
    output: Path,
    *,
    names: Sequence[str] = (),
    examples: int = 2,
    by: str = "image",
    teacher_maps: TeacherMaps | None = None,
) -> str:
    """Write an HTML report, and its numbers into a JSON file with the same name. What is missing, the page reports.

    Args:
        words: the arms, as in `read_arms`. The first one is the baseline of the differences.
        output: the HTML file. The suffix of the JSON file is .json.
        names: the evaluations to show, in this order; by default all. The title is about the first one.
        examples: number of example questions of each kind, per data set.
        by: what makes samples dependent in the comparison: "image", "patient", or "key" for independent samples.
        teacher_maps: computes the maps of a run's teacher; None shows none.

    Returns:
        The title of the page: what was found.

    Raises:
        DataError: a folder contains no evaluation.
        ConfigError: `output` cannot be written, or the words do not name arms.
    """
    arms = read_arms(words, names)
    scored = [_score(arms, name, by) for name in evaluation_names(arms)]
    sets = [find_examples(arms, one.table.name, examples, teacher_maps) for one in scored] if examples else []
    summaries = [training_summary(run) for arm in arms for run in arm.runs]
    title = headline(scored[0].table, scored[0].differences)
    page, output = _render(title, arms, scored, sets, summaries), Path(output)
    data = json.dumps(as_data(title, scored, summaries), indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(output.with_suffix(".json"), data)
        write_text(output, page)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}); choose another file") from error
    return title


def _render(
    title: str,
    arms: Sequence[Arm],
    scored: Sequence[Scored],
    sets: Sequence[Examples],
    summaries: Sequence[TrainingSummary],
) -> str:
    source = find_origin(arms)
    values = {
        "title": title,
        "details": details(scored[0].table, scored[0].differences),
        "arms": arms,
        "series": _series(arms),
        "scored": scored,
        "sets": sets,
        "pictures": any(example.picture for one in sets for example in one.items),
        "panels": [(panel.title, Markup(panel.svg), panel.download) for panel in curves.panels(arms)],  # noqa: S704, own
        "training": training_table(summaries),
        "settings": settings_table(arms),
        "facts": source.common,
        "origin": origin_table(source),
    }
    return _environment().get_template(TEMPLATE).render(values)


def _series(arms: Sequence[Arm]) -> dict[str, int]:
    """Return the color of each arm and of its runs, by title."""
    places = {arm.title: place % curves.SERIES for place, arm in enumerate(arms)}
    return places | {run.title: places[arm.title] for arm in arms for run in arm.runs}


def _score(arms: Sequence[Arm], name: str, by: str) -> Scored:
    table, differences = score_table(arms, name, PAGE_COLUMNS), find_differences(arms, name, by)
    groups = [(group, places, score_download(table, group, places, differences)) for group, places in table.groups()]
    return Scored(table, differences, groups)


def format_table(words: Sequence[str | Path], names: Sequence[str] = ()) -> str:
    """Return the score tables as text with aligned columns, one per data set, each followed by its remarks.

    Args:
        words: the arms, as in `read_arms`.
        names: the evaluations to show, in this order; by default all.
    """
    arms = read_arms(words, names)
    return "\n\n".join(_as_lines(score_table(arms, name)) for name in evaluation_names(arms))


def format_evaluation(folder: Path) -> str:
    """Return the score table of one evaluation as text, followed by its remarks."""
    return _as_lines(score_table([read_evaluation(folder)], folder.name))


def format_scored(paths: Sequence[Path]) -> str:
    """Return one score table of several files of scores as text, followed by its remarks."""
    return _as_lines(score_table(read_scored(paths), ""))


def _as_lines(table: ScoreTable) -> str:
    return "\n".join([format_score_table(table), *table.remarks()])


def as_data(title: str, scored: Sequence[Scored], summaries: Sequence[TrainingSummary]) -> dict[str, Any]:
    """Return the numbers of the page: scores as in scores.json, comparisons, and the summary of each training."""
    return {
        "title": title,
        "tables": [
            {
                "name": one.table.name,
                "rows": [
                    {"run": run.title, **evaluation.scores, **evaluation.questions}
                    for arm, _ in one.table.rows
                    for run in arm.runs
                    if (evaluation := run.evaluations.get(one.table.name)) is not None
                ],
                "comparisons": [difference.comparison.as_data() for difference in one.differences.found.values()],
            }
            for one in scored
        ],
        "training": [{**vars(item), "run": item.run.title} for item in summaries],
    }


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("medalign.evaluation.report", "."),
    )
    environment.filters["number"] = _format_number
    environment.filters["percent"] = _format_share
    environment.filters["at"] = lambda place, values: values[place]
    environment.globals["palettes"] = {"light": curves.LIGHT, "dark": curves.DARK}
    environment.globals["script"] = Markup(SCRIPT)  # noqa: S704, a file of the package
    environment.globals["script_hash"] = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return environment


def _format_number(value: float | None, digits: int = 1) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.{digits}f}"


def _format_share(value: float) -> str:
    """Return a fraction in percent, with a digit after the point only if it is small."""
    return f"{100 * value:.{0 if value >= 0.095 else 1}f}\N{NO-BREAK SPACE}%"
