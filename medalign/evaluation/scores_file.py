"""scores.json: the scores of a file of predictions, with what they were measured on.

Scores depend only on the predictions: computing them again gives the same file, bit by bit. What cannot be computed
from the predictions (FACTS) is kept as the evaluation wrote it. So are scores that other programs computed on request,
as long as the predictions are those that they were computed on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medalign.errors import ConfigError, DataError
from medalign.evaluation.metrics import Prediction, read_predictions, score
from medalign.evaluation.metrics.counts import count
from medalign.evaluation.probes.catalog import PRESUPPOSED
from medalign.evaluation.probes.scores import facts_of, probe_scores
from medalign.geometry import PatchGrid
from medalign.observability.files import write_text
from medalign.run_folder import EvaluationFolder

FACTS = (
    "name",
    "data",
    "grid",
    "samples",
    "limit",
    "max_length",
    "max_new_tokens",
    "decoding",
    "unreadable",
    "truncated",
    "provenance",
)


def format_scores(rows: Sequence[Prediction], facts: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> str:
    """Return the text of a file with the scores and counts of the predictions.

    Args:
        rows: the predictions.
        facts: values of FACTS, which the evaluation knows.
        more: further scores.
    """
    kept = {name: facts[name] for name in FACTS if name in facts}
    grid = PatchGrid(*kept["grid"]) if kept.get("grid") else None
    scores, more = score(rows, grid), dict(more or {})
    if missing := scores.pop("not_available", {}) | more.pop("not_available", {}):
        more["not_available"] = missing
    return json.dumps(scores | more | kept | count(rows), indent=2) + "\n"


Further = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]
_FURTHER = "further"  # of which predictions the further scores are, their names, and those that are missing


def rescore(predictions: Path, further: Sequence[Further] = ()) -> Path:
    """Compute the scores of a file of predictions again.

    Args:
        predictions: a file of an evaluation, or one of another system; or the folder of an evaluation.
        further: functions that return further scores of reports, from predictions and references.

    Returns:
        The file with the scores, beside the predictions: scores.json for predictions.jsonl, NAME.scores.json for any
        other NAME.jsonl.

    Raises:
        DataError: the file does not exist or is not a file of predictions.
    """
    path = predictions_file(predictions)
    rows = read_rows(path)
    output = scores_path(path)
    facts = read_scores(output) if output.is_file() else {}
    more = _further_scores(rows, further, facts)
    if probes := facts.get("probes"):
        more["probes"] = {name: _probe(EvaluationFolder(path.parent), name, probes[name], rows) for name in probes}
    write_text(output, format_scores(rows, facts, more))
    return output


def _further_scores(
    rows: Sequence[Prediction], further: Sequence[Further], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scores of `further`, and those that are already in the file and are of the same predictions."""
    reports = [(row.prediction, row.answer) for row in rows if row.task == "report"]
    if not reports:
        return {}
    digest = hashlib.sha256(json.dumps(reports).encode()).hexdigest()
    known = before.get(_FURTHER, {})
    scores: dict[str, Any] = {}
    missing: dict[str, str] = {}
    if known.get("predictions_sha256") == digest:
        scores |= {name: before[name] for name in known["scores"] if name in before}
        missing |= {name: before["not_available"][name] for name in known["missing"]}
    for scores_of in further:
        found = dict(scores_of(*zip(*reports, strict=True)))
        reasons = found.pop("not_available", {})
        missing = {name: reason for name, reason in missing.items() if name not in found} | reasons
        scores = {name: value for name, value in scores.items() if name not in reasons} | found
    if not scores and not missing:
        return {}
    record = {"predictions_sha256": digest, "scores": list(scores), "missing": list(missing)}
    return scores | {_FURTHER: record} | ({"not_available": missing} if missing else {})


def record_probe(folder: EvaluationFolder, name: str, facts: Mapping[str, Any]) -> None:
    """Record in the scores that a probe was asked. Its scores follow with `rescore`.

    Args:
        folder: of the evaluation.
        name: of the probe.
        facts: what its predictions do not tell: `unreadable` and `not_asked`.
    """
    scores = read_scores(folder.scores)
    scores["probes"] = {**scores.get("probes", {}), name: dict(facts)}
    write_text(folder.scores, json.dumps(scores, indent=2) + "\n")


def _probe(
    folder: EvaluationFolder, name: str, before: Mapping[str, Any], real: Sequence[Prediction]
) -> dict[str, Any]:
    """Return the scores of a probe with what only the evaluation knows. Without questions it has no file."""
    path = folder.probe(name)
    if not path.is_file():
        if before.get("n") or before.get("present_n"):
            raise DataError(
                f"{path} does not exist, but {folder.scores} has its scores; copy it there, or evaluate again"
            )
        return {"n": 0, **facts_of(before)}
    return probe_scores(name, read_rows(path), real) | facts_of(before)


def require_no_longer(folder: EvaluationFolder, samples: int) -> None:
    """Raise ConfigError if a folder has an evaluation of more samples than `samples`."""
    if not folder.scores.is_file():
        return
    before = read_scores(folder.scores)
    known = before.get("n", 0) + before.get("unreadable", 0)
    if known > samples:
        raise ConfigError(
            f"{folder.path} has the evaluation of {known} samples, and this one has only {samples}; choose another "
            "--name, or replace it with --overwrite"
        )


def predictions_file(path: Path) -> Path:
    """Return the file of predictions that a path names: itself, or the one in the folder of an evaluation.

    Raises:
        DataError: there is none.
    """
    file = EvaluationFolder(path).predictions if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a file of predictions or the folder of an evaluation")
    if file == EvaluationFolder(file.parent).probe(PRESUPPOSED):
        raise DataError(
            f"{file}: its references are not answers, so these scores do not fit it; its own are in scores.json under "
            "probes"
        )
    return file


def scores_path(predictions: Path) -> Path:
    """Return the file for the scores of a file of predictions."""
    folder = EvaluationFolder(predictions.parent)
    return folder.scores if predictions == folder.predictions else predictions.with_suffix(f".{folder.scores.name}")


def read_rows(path: Path) -> list[Prediction]:
    """Read predictions, of which each folder has a key once.

    Raises:
        DataError: a line is not a prediction, a key occurs twice, or there is none at all.
    """
    rows = read_predictions(path)
    if not rows:
        raise DataError(f"{path} contains no prediction")
    (folder, key), times = Counter((row.folder, row.key) for row in rows).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path} contains the key {key!r} {times} times in folder {folder}; keep one of these lines")
    return rows


def read_scores(path: Path) -> dict[str, Any]:
    """Read a file of scores.

    Raises:
        DataError: it is not a JSON object.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; evaluate the run again") from error
    parts = ("probes", "not_available", _FURTHER)
    if not isinstance(scores, dict) or not all(isinstance(scores.get(name, {}), dict) for name in parts):
        raise DataError(f"{path} contains no scores; evaluate the run again")
    return scores
