"""Reads the files of a run that a report shows: configuration, metrics, scores, predictions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medalign.errors import ConfigError, DataError
from medalign.evaluation.comparison.arms import parse_word
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.metrics import Prediction, read_predictions
from medalign.evaluation.metrics.intervals import mean
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

    @cached_property
    def questions(self) -> dict[str, Any]:
        """The share of all questions that are answered correctly; nothing where only one kind of question was asked."""
        if not self.scores.get("closed_n") or not self.scores.get("open_n"):
            return {}
        measure = MEASURES["questions_correct"]
        rows = [row for row in self.predictions.values() if measure.applies(row)]
        return {"questions_n": len(rows), **mean("questions_correct", measure.values(rows))}


@dataclass(frozen=True)
class RunRecord:
    """The data of a run for a report."""

    path: Path
    title: str
    config: dict[str, Any]  # dotted keys; empty if there is no config.yaml
    rows: list[dict[str, Any]]  # of metrics.jsonl; empty if nothing was trained
    evaluations: dict[str, Evaluation]


@dataclass(frozen=True)
class Arm:
    """One row of a report: a run, or several runs that differ only in their seed."""

    title: str
    runs: tuple[RunRecord, ...]

    @property
    def several(self) -> bool:
        """Whether it has more than one seed."""
        return len(self.runs) > 1

    def evaluations(self, name: str) -> list[Evaluation]:
        """Return the evaluations of its runs on one data set."""
        return [run.evaluations[name] for run in self.runs if name in run.evaluations]


def read_arms(words: Sequence[str | Path], names: Sequence[str] = ()) -> list[Arm]:
    """Read the runs of a report.

    Args:
        words: `PATH`, `NAME=PATH`, or `NAME=PATH,PATH,...` with one run per seed. An arm without a name has that of its
            folder, with as many parent folders as are needed to make it unique.
        names: the evaluations to read, in this order; by default all of them.

    Raises:
        DataError: a folder does not exist or contains no evaluation, or none of `names`.
        ConfigError: two arms have the same name, or an arm names a run twice.
    """
    if not words:
        raise DataError("no runs; give the folder of at least one run")
    parsed = [parse_word(str(word)) for word in words]
    unnamed = iter(_titles([paths[0] for name, paths in parsed if not name and len(paths) == 1]))
    arms = []
    for word, (name, paths) in zip(words, parsed, strict=True):
        title = name or (next(unnamed) if len(paths) == 1 else str(word))
        if len(set(paths)) < len(paths):
            raise ConfigError(f"arm {title} names the same run twice; give each seed once")
        arms.append(Arm(title, tuple(_with_seeds(title, [_read_run(path, title, names) for path in paths]))))
    if len({arm.title for arm in arms}) < len(arms):
        raise ConfigError(f"arms must have different names: {', '.join(arm.title for arm in arms)}; write NAME=PATH")
    return arms


def _with_seeds(title: str, runs: Sequence[RunRecord]) -> Iterator[RunRecord]:
    """Yield the runs of one arm. The title of one of several names its seed, or its place where the seeds are equal."""
    seeds = [run.config.get("run.seed") for run in runs]
    for place, (run, seed) in enumerate(zip(runs, seeds, strict=True), start=1):
        detail = f"seed {seed}" if None not in seeds and len(set(seeds)) == len(seeds) else f"run {place}"
        yield run if len(runs) == 1 else replace(run, title=f"{title}, {detail}")


def read_evaluation(folder: Path) -> Arm:
    """Read a single evaluation, as an arm without other evaluations."""
    run = folder.absolute().parents[1]
    return _scored(run, run.name, folder.name, EvaluationFolder(folder).scores)


def read_scored(paths: Sequence[Path]) -> list[Arm]:
    """Read files of scores, each as an arm with one evaluation whose name is ""; its title is the path."""
    return [_scored(path, str(path), "", path) for path in paths]


def _scored(run: Path, title: str, name: str, scores: Path) -> Arm:
    evaluation = Evaluation(scores.parent, read_scores(scores))
    return Arm(title, (RunRecord(run, title, config={}, rows=[], evaluations={name: evaluation}),))


def evaluation_names(arms: Sequence[Arm]) -> list[str]:
    """Return all data sets on which a run was evaluated, in the order of first occurrence."""
    return list(dict.fromkeys(name for arm in arms for run in arm.runs for name in run.evaluations))


def config_differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the arms, without those that differ only between seeds.

    Returns:
        The dotted key of each setting and its value in each arm as text: the values of its seeds where they differ, and
        "" for an arm without it.
    """
    configured = [arm for arm in arms if any(run.config for run in arm.runs)]
    keys = dict.fromkeys(key for arm in configured for run in arm.runs for key in run.config)
    texts = {key: {arm.title: _values(arm, key) for arm in configured} for key in keys}
    differing = {key: values for key, values in texts.items() if len(set(values.values())) > 1}
    return [(key, [values.get(arm.title, "") for arm in arms]) for key, values in differing.items()]


def _values(arm: Arm, key: str) -> str:
    return ", ".join(dict.fromkeys(_text(run.config[key]) for run in arm.runs if key in run.config))


def _read_run(path: Path, title: str, names: Sequence[str] = ()) -> RunRecord:
    if not path.is_dir():
        raise DataError(f"run folder {path} does not exist")
    home, prefix = find_run(path)
    evaluated = home.evaluations(prefix)
    if not evaluated:
        lacks = (home if prefix else RunFolder(Path())).evaluation(f"{prefix}*").scores
        raise DataError(f"run {path} has no {lacks}; evaluate it first (medalign evaluate)")
    found = {one.path.name.removeprefix(prefix): one for one in evaluated}
    chosen = [name for name in names or found if name in found]
    if not chosen:
        raise DataError(f"run {path} has no evaluation {' or '.join(names)}; choose --name from {', '.join(found)}")
    return RunRecord(
        path=path,
        title=title,
        config=_read_config(home.config),
        rows=read_rows(home.metrics) if home.metrics.is_file() else [],
        evaluations={name: Evaluation(found[name].path, read_scores(found[name].scores)) for name in chosen},
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
    for depth in range(1, max(map(len, paths_parts), default=0) + 1):
        titles = ["/".join(parts[-depth:]) for parts in paths_parts]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{path.name} ({position})" for position, path in enumerate(paths, start=1)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
