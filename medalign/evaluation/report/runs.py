"""Reads the files of a run that a report shows: configuration, metrics, scores, predictions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medalign.errors import ConfigError, DataError
from medalign.evaluation.metrics import Prediction, read_predictions
from medalign.evaluation.scores_file import read_scores
from medalign.geometry import PatchGrid
from medalign.observability.rows import read_rows
from medalign.run_folder import EvaluationFolder, RunFolder, find_run


@dataclass(frozen=True)
class Evaluation:
    """Scores and predictions of a run on one data set."""

    folder: Path
    scores: dict[str, Any]

    @property
    def data(self) -> list[str]:
        """The evaluated shard folders."""
        return list(self.scores.get("data", []))

    @property
    def grid(self) -> PatchGrid | None:
        """The student's grid, which is the grid of the attention in the predictions."""
        grid = self.scores.get("grid")
        return PatchGrid(*grid) if grid else None

    @cached_property
    def predictions(self) -> dict[str, Prediction]:
        """Predictions by key, in order; none without the file. A repeated key is preceded by its folder."""
        path = EvaluationFolder(self.folder).predictions
        rows = read_predictions(path) if path.is_file() else []
        times = Counter(row.key for row in rows)
        return {row.key if times[row.key] == 1 else f"{self.data[row.folder]}/{row.key}": row for row in rows}


@dataclass(frozen=True)
class RunRecord:
    """The data of a run for a report."""

    path: Path
    title: str
    config: dict[str, Any]  # dotted keys; empty if there is no config.yaml
    rows: list[dict[str, Any]]  # of metrics.jsonl; empty if nothing was trained
    evaluations: dict[str, Evaluation]


def read_runs(paths: Sequence[Path], titles: Sequence[str] | None = None) -> list[RunRecord]:
    """Read runs for a report.

    Args:
        paths: folders of the runs.
        titles: names of the runs; by default the names of their folders, with as many parent folders as are needed to
            make them unique.

    Raises:
        DataError: a folder does not exist or contains no evaluation.
        ConfigError: the number of titles does not match the number of runs.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise DataError("no runs; give the folder of at least one run")
    if titles is not None and len(titles) != len(paths):
        raise ConfigError(f"{len(titles)} titles for {len(paths)} runs; give one title per run")
    return [_read_run(path, title) for path, title in zip(paths, titles or _titles(paths), strict=True)]


def read_evaluation(folder: Path) -> RunRecord:
    """Read a single evaluation, as a run without other evaluations."""
    evaluation = Evaluation(folder, read_scores(EvaluationFolder(folder).scores))
    run = folder.absolute().parents[1]
    return RunRecord(run, run.name, config={}, rows=[], evaluations={folder.name: evaluation})


def read_scored(paths: Sequence[Path]) -> list[RunRecord]:
    """Read files of scores, each as a run with one evaluation whose name is ""; its title is the path."""
    return [
        RunRecord(path, str(path), config={}, rows=[], evaluations={"": Evaluation(path.parent, read_scores(path))})
        for path in paths
    ]


def evaluation_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return all data sets on which a run was evaluated, in the order of first occurrence."""
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the runs.

    Returns:
        The dotted key of each setting and its value in each run as text, "" for a run without it.
    """
    with_config = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in with_config for key in run.config)
    texts = [(key, [_text(run.config[key]) if key in run.config else "" for run in runs]) for key in keys]
    columns = [i for i, run in enumerate(runs) if run.config]
    return [(key, values) for key, values in texts if len({values[i] for i in columns}) > 1]


def _read_run(path: Path, title: str) -> RunRecord:
    if not path.is_dir():
        raise DataError(f"run folder {path} does not exist")
    home, prefix = find_run(path)
    evaluated = home.evaluations(prefix)
    if not evaluated:
        lacks = (home if prefix else RunFolder(Path())).evaluation(f"{prefix}*").scores
        raise DataError(f"run {path} has no {lacks}; evaluate it first (medalign evaluate)")
    return RunRecord(
        path=path,
        title=title,
        config=_read_config(home.config),
        rows=read_rows(home.metrics) if home.metrics.is_file() else [],
        evaluations={
            one.path.name.removeprefix(prefix): Evaluation(one.path, read_scores(one.scores)) for one in evaluated
        },
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    return dict(_flat(values)) if isinstance(values, Mapping) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _titles(paths: Sequence[Path]) -> list[str]:
    paths_parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, paths_parts)) + 1):
        titles = ["/".join(parts[-depth:]) for parts in paths_parts]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{path.name} ({position})" for position, path in enumerate(paths, start=1)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
