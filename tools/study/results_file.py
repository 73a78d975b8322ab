"""The result file of a run: what it was, its scores, and which question it answered correctly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import medalign
from medalign import config as medalign_config
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.answers import given_yes_or_no, yes_or_no
from medalign.evaluation.scores_file import read_rows, read_scores, rescore
from medalign.observability.rows import read_rows as read_metrics
from medalign.run_folder import EvaluationFolder, RunFolder
from tools.study.arms import Run

PRIMARY = "questions_correct"
SCORES = (
    "closed_accuracy",
    "open_exact",
    "open_recall",
    "bleu",
    "rouge_l",
    "attention_inside",
    "box_area",
    "pointing_hits",
    "pointing_chance",
    "conditional_n",
    "asked_denser",
    "asked_pointing",
    "other_pointing",
    "map_change",
    "map_change_same",
)
ASSETS = Path(medalign.__file__).parent / "assets"
DIGITS = 6


def collect(run: Run, folder: Path, evaluation: str, commands: Sequence[str], commit: str) -> dict[str, Any]:
    """Score the answers of a finished run again and return its result.

    Args:
        run: what was run.
        folder: the folder of the run.
        evaluation: name of its evaluation.
        commands: the commands that made it, without absolute paths.
        commit: the commit of the code that trained it.
    """
    home = RunFolder(folder)
    answers = EvaluationFolder(home.evaluation(evaluation).path)
    rescore(answers.path)
    rows, scores = read_rows(answers.predictions), read_scores(answers.scores)
    asked = [row for row in rows if MEASURES[PRIMARY].applies(row)]
    correct = [bool(_correct(row)) for row in asked]
    settings = medalign_config.read(home.config)
    metrics = read_metrics(home.metrics) if home.metrics.is_file() else []
    return {
        "arm": run.arm,
        "seed": run.seed,
        "trial": run.trial,
        "films": run.films,
        "peak_lr": settings.train.lr,
        "steps": settings.train.steps,
        "commit": commit,
        "commands": list(commands),
        "settings": digest(medalign_config.dump(_without_places(settings))),
        "student": _digest_of_files(ASSETS / "phantom_student"),
        "teacher": _digest_of_files(ASSETS / "phantom_teacher"),
        "weights": scores["provenance"]["weights"],
        "versions": scores["provenance"]["versions"],
        "losses": _last_losses(metrics),
        "diverged_steps": metrics[-1].get("train/diverged_steps", 0) if metrics else 0,
        "questions": len(asked),
        "keys": digest("\n".join(row.key for row in asked)),
        "scores": {PRIMARY: round(sum(correct) / len(correct), DIGITS), **_scores(scores, rows)},
        "correct": "".join("01"[one] for one in correct),
    }


def digest(text: str) -> str:
    """Return 64 bits of the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def false_yes(rows: Sequence[Prediction]) -> float:
    """Return the share of yes among the answers to questions whose reference is no."""
    given = [given_yes_or_no(row.prediction) for row in rows if row.task == "vqa" and yes_or_no(row.answer) == "no"]
    return given.count("yes") / len(given)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a folder by the names of their runs."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _correct(row: Prediction) -> float:
    value = MEASURES[PRIMARY].value
    assert value is not None
    return value(row)


def _scores(scores: Mapping[str, Any], rows: Sequence[Prediction]) -> dict[str, float]:
    found = {name: scores[name] for name in SCORES if name in scores}
    return {name: round(value, DIGITS) for name, value in (found | {"false_yes": false_yes(rows)}).items()}


def _without_places(settings: medalign_config.Config) -> medalign_config.Config:
    """The settings without the folders and the seed, which differ between the runs of an arm."""
    run = replace(settings.run, dir="", seed=0)
    teacher = replace(settings.teacher, path="", random_weights_seed=None)
    return replace(
        settings,
        run=run,
        teacher=teacher,
        data=replace(settings.data, train=""),
        student=replace(settings.student, path=""),
    )


def _last_losses(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = metrics[-1] if metrics else {}
    return {name: round(value, DIGITS) for name, value in last.items() if name.startswith("loss/")}


def _digest_of_files(folder: Path) -> str:
    """Return 64 bits of a SHA-256 over the files of a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]
