"""The scores of an evaluation's probes as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medalign.evaluation.scores_file import read_scores
from medalign.run_folder import EvaluationFolder

_COLUMNS = ("probe", "questions", "accuracy", "real", "drop", "95 % interval", "yes", "yes real")


def format_probes(path: Path) -> str:
    """Return a table of the probes of an evaluation, one row per probe, in percent; "" without probes.

    Args:
        path: folder of the evaluation.
    """
    probes: dict[str, dict[str, Any]] = read_scores(EvaluationFolder(path).scores).get("probes", {})
    if not probes:
        return ""
    rows = [_COLUMNS, *(_row(name, scores) for name, scores in probes.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    remarks: dict[str, list[str]] = {}
    for name, scores in probes.items():
        for reason, count in scores.get("not_asked", {}).items():
            remarks.setdefault(f"{count} {reason} left out", []).append(name)
        if unreadable := scores.get("unreadable"):
            remarks.setdefault(f"{unreadable} questions could not be read; no score includes them", []).append(name)
    lines += [f"{', '.join(names)}: {remark}" for remark, names in remarks.items()]
    return "\n" + "\n".join(lines) + "\n"


def _row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    low, high = (f"accuracy{'_drop' if 'accuracy_drop' in scores else ''}_{end}" for end in ("low", "high"))
    interval = f"{_percent(scores, low)} to {_percent(scores, high)}" if low in scores else ""
    values = ("accuracy", "accuracy_real", "accuracy_drop")
    shares = ("yes_share", "yes_share_real")
    return (
        name,
        str(scores["n"]),
        *(_percent(scores, key) for key in values),
        interval,
        *(_percent(scores, key) for key in shares),
    )


def _percent(scores: dict[str, Any], key: str) -> str:
    return f"{round(100 * scores[key], 1) + 0.0:.1f}" if key in scores else ""  # no -0.0
