"""Decoding methods with their published settings on finished runs: the scores beside those of greedy decoding.

    python -m tools.study.decoding --runs "{L: runs/L, B: runs/B}" --data data/val --limit 200 --output decoding.json

Writes, for each run and method, the scores, their paired differences to greedy decoding with 95 % intervals of a
bootstrap over films, and p of a permutation test, adjusted by Holm for all methods and scores of the run. The answers
are evaluations of the runs, so a call that ends early resumes. Prints the differences as a table.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from medalign.decoding.base import Decoding
from medalign.decoding.registry import METHODS, find_method
from medalign.evaluation.comparison.arms import read_arm
from medalign.evaluation.comparison.compare import compare
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluator import evaluate_each

SCORES = ("questions_correct", "closed_accuracy", "open_exact", "bleu")
TABLE = {"questions_correct": "questions correct", "bleu": "BLEU of reports"}
KEPT = ("metric", "samples", "baseline_score", "arm_score", "difference", "low", "high", "p", "p_holm")


def main(
    runs: dict[str, Path],
    data: Path,
    output: Path,
    methods: list[str] | None = None,
    limit: int | None = None,
    name: str = "decoding",
    batch_size: int = 32,
) -> None:
    """Evaluate runs with several methods and write the comparison.

    Args:
        runs: folder of each run.
        data: folder of shards.
        output: JSON file to write.
        methods: all packaged methods by default; greedy is always among them.
        limit: only the first samples.
        name: name of the evaluations in the runs.
        batch_size: questions per batch.
    """
    chosen = ["greedy", *(other for other in methods or METHODS if other != "greedy")]
    decodings = [Decoding(method=find_method(method)()) for method in chosen]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tools.study.decoding", *sys.argv[1:]]),
        "settings": {method: decoding.method.describe() for method, decoding in zip(chosen, decodings, strict=True)},
        "runs": {},
    }
    for arm, run in runs.items():
        folders = evaluate_each(
            run,
            [str(data)],
            decodings,
            name=name,
            batch_size=batch_size,
            limit=limit,
            max_length=None,
            max_skip_fraction=0.0,
            base=None,
            overwrite=False,
            command=None,
        )
        arms = [read_arm(f"{method}={folder}") for method, folder in zip(chosen, folders, strict=True)]
        rows: dict[str, list[dict[str, Any]]] = {}
        for one in compare(arms, metrics=SCORES):
            found = one.as_data()
            rows.setdefault(one.arm, []).append({key: found[key] for key in KEPT})
        result["runs"][arm] = rows
        output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the differences of the answers and of BLEU as a table of Markdown, in points."""
    lines = ["| method |", "| --- |"]
    lines += [f"| `{method}` |" for method in next(iter(result["runs"].values()))]
    for arm, rows in result["runs"].items():
        for metric, label in TABLE.items():
            found = {method: next(one for one in ones if one["metric"] == metric) for method, ones in rows.items()}
            factor = MEASURES[metric].scale
            greedy = next(iter(found.values()))["baseline_score"] * factor
            lines[0] += f" {arm}: {label} (greedy {greedy:.1f}) |"
            lines[1] += " --- |"
            for place, one in enumerate(found.values(), 2):
                low, high = one["low"] * factor, one["high"] * factor
                lines[place] += f" {one['difference'] * factor:+.1f} [{low:.1f}, {high:.1f}] |"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
