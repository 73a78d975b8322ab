"""What the folder of a run holds for a report: configuration, metrics, scores, predictions."""

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
from medalign.geometry import PatchGrid
from medalign.observability.sinks import read_rows


@dataclass(frozen=True)
class Evaluation:
    """One scored data set of a run."""

    folder: Path
    scores: dict[str, Any]

    @property
    def data(self) -> list[str]:
        """The shard folders that were evaluated."""
        return list(self.scores.get("data", []))

    @property
    def grid(self) -> PatchGrid | None:
        """The student's grid, on which the predictions' attention lies."""
        grid = self.scores.get("grid")
        return PatchGrid(*grid) if grid else None

    @cached_property
    def predictions(self) -> dict[str, Prediction]:
        """Predictions by key, in order; none without the file. A key that comes twice names its folder too."""
        path = self.folder / "predictions.jsonl"
        rows = read_predictions(path) if path.is_file() else []
        times = Counter(row.key for row in rows)
        return {row.key if times[row.key] == 1 else f"{self.data[row.folder]}/{row.key}": row for row in rows}


@dataclass(frozen=True)
class RunRecord:
    """A run as the report sees it."""

    path: Path
    title: str
    config: dict[str, Any]  # dotted keys; empty where there is no config.yaml
    rows: list[dict[str, Any]]  # of metrics.jsonl; empty where nothing was trained
    evaluations: dict[str, Evaluation]


def read_runs(paths: Sequence[Path], titles: Sequence[str] | None = None) -> list[RunRecord]:
    """The records of the runs, titled by their folders' names, or by as much of the path as tells them apart.

    Raises DataError for a folder that is none or holds no evaluation, ConfigError for a wrong number of titles.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise DataError("no run is named; give at least one run's folder")
    if titles is not None and len(titles) != len(paths):
        raise ConfigError(f"{len(titles)} titles for {len(paths)} runs; give one for each")
    return [_read_run(path, title) for path, title in zip(paths, titles or _titles(paths), strict=True)]


def read_evaluation(folder: Path) -> RunRecord:
    """One evaluation alone, as a run that has no other."""
    evaluation = Evaluation(folder, _read_scores(folder / "scores.json"))
    run = folder.absolute().parents[1]
    return RunRecord(run, run.name, config={}, rows=[], evaluations={folder.name: evaluation})


def evaluation_home(path: Path) -> tuple[Path, str]:
    """The folder whose evaluation/ belongs to a run, a checkpoint or an export, and what its names there begin with.

    Those of a checkpoint begin with its step and lie in its run's folder, for a checkpoint is deleted when it is old.
    """
    whole = path.resolve()
    for folder in (whole, whole.parent):
        if folder.parent.name == "checkpoints" and folder.name.startswith("step-"):
            return folder.parents[1], f"{folder.name}-"
    return path, ""


def evaluation_names(runs: Sequence[RunRecord]) -> list[str]:
    """Every data set that some run was scored on, in the order of first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The settings that differ between the runs: dotted key, and each run's value as text ("" where it has none)."""
    with_config = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in with_config for key in run.config)
    texts = [(key, [_text(run.config[key]) if key in run.config else "" for run in runs]) for key in keys]
    columns = [i for i, run in enumerate(runs) if run.config]
    return [(key, values) for key, values in texts if len({values[i] for i in columns}) > 1]


def _read_run(path: Path, title: str) -> RunRecord:
    if not path.is_dir():
        raise DataError(f"run folder {path} does not exist")
    home, prefix = evaluation_home(path)
    scores = sorted(home.glob(f"evaluation/{prefix}*/scores.json"))
    if not scores:
        lacks = f"{home}/evaluation/{prefix}*/scores.json" if prefix else "evaluation/*/scores.json"
        raise DataError(f"run {path} has no {lacks}; evaluate it first (medalign evaluate)")
    metrics = home / "metrics.jsonl"
    return RunRecord(
        path=path,
        title=title,
        config=_read_config(home / "config.yaml"),
        rows=read_rows(metrics) if metrics.is_file() else [],
        evaluations={
            file.parent.name.removeprefix(prefix): Evaluation(file.parent, _read_scores(file)) for file in scores
        },
    )


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; evaluate the run again") from error
    if not isinstance(scores, dict):
        raise DataError(f"{path} holds no scores; evaluate the run again")
    return scores


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
    whole = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        titles = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
