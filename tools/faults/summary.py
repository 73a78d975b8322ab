"""Counts and times of the trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Trial = dict[str, Any]


def read_trials(path: Path) -> list[Trial]:
    """Read the trials of a folder."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def summarize(trials: Sequence[Trial], about: dict[str, Any]) -> dict[str, Any]:
    """Return counts by kind and ranks, and the seconds from a signal in a step to a checkpoint and to the end."""
    kinds = sorted({(trial["kind"], trial["ranks"]) for trial in trials})
    return {
        **about,
        "trials": len(trials),
        "survived": sum(trial["survived"] for trial in trials),
        "in_start": sum(trial["in"] == "start" for trial in trials),
        "faults": [
            _describe(kind, ranks, [t for t in trials if (t["kind"], t["ranks"]) == (kind, ranks)])
            for kind, ranks in kinds
        ],
    }


def _describe(kind: str, ranks: int, trials: Sequence[Trial]) -> dict[str, Any]:
    trained = [trial for trial in trials if trial["in"] == "training"]  # in the start there is no step to end
    times = {
        name: _spread([trial[name] for trial in trained if name in trial])
        for name in ("seconds_to_checkpoint", "seconds_to_end")
        if any(name in trial for trial in trained)
    }
    survived = sum(trial["survived"] for trial in trials)
    return {"kind": kind, "ranks": ranks, "trials": len(trials), "survived": survived, **times}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"count": len(values), "median": median(values), "largest": max(values)}


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table and a line for the documentation."""
    lines = [
        "| Fault | Ranks | Trials | Survived | Seconds to a checkpoint: median, largest | Seconds to the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary["faults"]:
        times = [_format_spread(row.get(name)) for name in ("seconds_to_checkpoint", "seconds_to_end")]
        lines.append(f"| {row['kind']} | {row['ranks']} | {row['trials']} | {row['survived']} | {' | '.join(times)} |")
    counts = f"{summary['survived']} of {summary['trials']} survived; {summary['in_start']} were injected in the start."
    return "\n".join([*lines, "", counts])


def _format_spread(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.1f}, {spread['largest']:.1f}" if spread else ""
