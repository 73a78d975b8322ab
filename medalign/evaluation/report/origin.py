"""Where the numbers of a report come from: seed, models, data, step, versions and command of each evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.evaluation.report.runs import Arm, Evaluation, RunRecord
from medalign.run_folder import find_run

UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Origin:
    """Facts about all evaluations of a report.

    Attributes:
        common: those that all evaluations share, with their value.
        labels: the names of the others.
        rows: of each evaluation, the title of its run and the values of `labels`.
    """

    common: list[tuple[str, str]]
    labels: list[str]
    rows: list[tuple[str, list[str]]]


def find_origin(arms: Sequence[Arm]) -> Origin:
    """Collect the facts about every evaluation of the arms."""
    found = [
        (run.title, _facts(run, name, evaluation))
        for arm in arms
        for run in arm.runs
        for name, evaluation in run.evaluations.items()
    ]
    first = found[0][1]
    shared = [label for label in first if all(facts[label] == first[label] for _, facts in found)]
    labels = [label for label in first if label not in shared]
    rows = [(title, [facts[label] for label in labels]) for title, facts in found]
    return Origin([(label, first[label]) for label in shared], labels, rows)


def _facts(run: RunRecord, name: str, evaluation: Evaluation) -> dict[str, str]:
    recorded = evaluation.scores.get("provenance", {})
    settings = recorded.get("settings", {})
    facts = {
        "evaluation": name,
        "seed": run.config.get("run.seed"),
        "step": recorded.get("step"),
        "student": _name(run.config.get("student.path")),
        "teacher": _teacher(run.config),
        "training data": _training_data(run, recorded.get("step")),
        "evaluated data": "; ".join(map(_listed, recorded.get("shards", []))),
        "weights": _digest(recorded.get("weights", {})),
        "precision": " on ".join(str(settings[key]) for key in ("dtype", "device") if key in settings),
        "versions": ", ".join(f"{package} {number}" for package, number in recorded.get("versions", {}).items()),
        "command": recorded.get("command"),
        "folder": str(run.path),
    }
    return {label: UNKNOWN if value in (None, "") else str(value) for label, value in facts.items()}


def _name(path: Any) -> str:
    """Return a path without the folders of an absolute one, which would name the machine."""
    return Path(path).name if path and Path(path).is_absolute() else str(path or "")


def _listed(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value))


def _teacher(config: Mapping[str, Any]) -> str:
    name = _name(config.get("teacher.path"))
    if name and config.get("teacher.random_weights_seed") is not None:
        name += " with random weights"
    return f"{name}, not used" if name and not distils(config) else name


def distils(config: Mapping[str, Any]) -> bool:
    """Return whether a run with these settings learned from its teacher."""
    trained = config.get("train.steps") != 0
    return trained and any((config.get(f"losses.{weight}") or 0) > 0 for weight in ("alpha", "beta"))


def _training_data(run: RunRecord, step: Any) -> str:
    """Return the training folders, and how large they were if the evaluated checkpoint still exists."""
    if run.config.get("train.steps") == 0:
        return "not trained"
    folders = run.config.get("data.train") or []
    names = ", ".join(map(_name, [folders] if isinstance(folders, str) else folders))
    progress = find_run(run.path)[0].checkpoints.step(step).progress if isinstance(step, int) else None
    if progress is None or not progress.is_file():
        return names
    return f"{names}: {'; '.join(json.loads(progress.read_text(encoding='utf-8')).get('data', []))}"


def _digest(weights: Mapping[str, str]) -> str:
    """Return the beginning of a SHA-256 over those of all files of an export."""
    if not weights:
        return ""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(weights.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
