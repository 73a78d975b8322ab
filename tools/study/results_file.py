"""The result file of a run: what it was, its scores, and which question it answered correctly."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import medalign
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.answers import given_yes_or_no, yes_or_no
from medalign.evaluation.scores_file import read_rows, read_scores, rescore
from medalign.observability.rows import read_rows as read_metrics
from medalign.run_folder import RunFolder
from tools.benchmarks.repeat_quickstart import questions
from tools.study.arms import Run
from tools.study.probes import PROBES

PRIMARY = "questions_correct"
COMMONEST = "commonest_answer"  # in the result of the base student
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
_TEACHER_SEED = "random_weights_seed"  # of arm U, which is that of the run


def collect(run: Run, folder: Path, commands: Sequence[str], commit: str) -> dict[str, Any]:
    """Score the answers of a finished run again and return its result, with the probes that were evaluated.

    Args:
        run: what was run.
        folder: the folder of the run.
        commands: the commands that made it, without absolute paths.
        commit: the commit of the code that trained it.
    """
    home = RunFolder(folder)
    answers = home.evaluation(run.held_out)
    rescore(answers.path)
    rows, scores = read_rows(answers.predictions), read_scores(answers.scores)
    asked = [row for row in rows if MEASURES[PRIMARY].applies(row)]
    correct = _correct(rows)
    probed = {f"{name}_film": home.evaluation(name) for name in PROBES if home.evaluation(name).scores.is_file()}
    primary = {PRIMARY: correct} | {name: _correct(read_rows(found.predictions)) for name, found in probed.items()}
    settings = yaml.safe_load(home.config.read_text(encoding="utf-8"))
    metrics = read_metrics(home.metrics) if home.metrics.is_file() else []
    return {
        "arm": run.arm,
        "seed": run.seed,
        "trial": run.trial,
        "films": run.films,
        "peak_lr": settings["train"]["lr"],
        "steps": settings["train"]["steps"],
        "commit": commit,
        "commands": list(commands),
        "settings": digest(json.dumps(_without_places(settings), sort_keys=True)),
        "student": _digest_of_files(ASSETS / "phantom_student"),
        "teacher": _digest_of_files(ASSETS / "phantom_teacher"),
        "weights": scores["provenance"]["weights"],
        "versions": scores["provenance"]["versions"],
        "losses": _last_losses(metrics),
        "diverged_steps": metrics[-1].get("train/diverged_steps", 0) if metrics else 0,
        "questions": len(asked),
        "keys": digest("\n".join(row.key for row in asked)),
        "scores": {name: round(sum(of) / len(of), DIGITS) for name, of in primary.items()} | _scores(scores, rows),
        "correct": "".join("01"[one] for one in correct),
    }


def digest(text: str) -> str:
    """Return 64 bits of the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def false_yes(rows: Sequence[Prediction]) -> float:
    """Return the share of yes among the answers to questions whose reference is no."""
    given = [given_yes_or_no(row.prediction) for row in rows if row.task == "vqa" and yes_or_no(row.answer) == "no"]
    return given.count("yes") / len(given)


def commonest_answer(train: Path, test: Path) -> float:
    """Return the share of questions whose answer is the most common one to the same question in the training films."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in questions(train):
        seen[sample["question"]][sample["answer"]] += 1
    right = [sample["answer"] in _first(seen[sample["question"]]) for sample in questions(test)]
    return round(sum(right) / len(right), DIGITS)


def _first(answers: Counter[str]) -> list[str]:
    return [answer for answer, _ in answers.most_common(1)]


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a folder by the names of their runs."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _correct(rows: Sequence[Prediction]) -> list[bool]:
    """Return for each question among the rows whether its answer is correct."""
    measure = MEASURES[PRIMARY]
    assert measure.value is not None
    return [bool(measure.value(row)) for row in rows if measure.applies(row)]


def _scores(scores: Mapping[str, Any], rows: Sequence[Prediction]) -> dict[str, float]:
    found = {name: scores[name] for name in SCORES if name in scores}
    return {name: round(value, DIGITS) for name, value in (found | {"false_yes": false_yes(rows)}).items()}


def _without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they were written, without those in which the runs of an arm differ and without folders."""
    apart = {"run": ("dir", "seed"), "data": ("train",), "student": ("path",), "teacher": ("path", _TEACHER_SEED)}
    return {
        section: {name: value for name, value in values.items() if name not in apart.get(section, ())}
        for section, values in settings.items()
    }


def _last_losses(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = metrics[-1] if metrics else {}
    return {name: round(value, DIGITS) for name, value in last.items() if name.startswith("loss/")}


def _digest_of_files(folder: Path) -> str:
    """Return 64 bits of a SHA-256 over the files of a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]
