"""`medalign ground` and `medalign separability` on several students and the same films, as one small file.

    python -m tools.benchmarks.instruments --runs L=runs/trial-L-0.003 B=runs/trial-B-0.003 base=runs/base \
        --data data/development/val --limit 200 --output tools/benchmarks/results/instruments.json

The runs are not changed: each export is copied to a temporary folder first. One seed of each arm shows how the
instruments behave, and nothing about the arms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medalign.checkpoint.export import find_export
from medalign.evaluation.ground_table import format_grounding
from medalign.evaluation.separability_table import format_separability
from medalign.grounding import ground
from medalign.separability import measure_separability

GROUNDING = (  # row, part of the result, score, what a uniform map scores
    ("question: inside the boxes", "question", "inside", "inside_uniform"),
    ("question: pointing hits", "question", "pointing_hits", "pointing_chance"),
    ("question: average precision", "question", "box_ap", "box_ap_uniform"),
    ("question: IoU", "question", "box_iou", "box_iou_uniform"),
    ("question: average precision, masks", "question_mask", "mask_ap", "mask_ap_uniform"),
    ("answer: inside the boxes", "answer", "inside", "inside_uniform"),
    ("answer: average precision", "answer", "box_ap", "box_ap_uniform"),
    ("deletion, gain over random", "removal", "deletion_gain", ""),
    ("insertion, gain over random", "removal", "insertion_gain", ""),
)
LEFT_OUT = ("command", "provenance", "limit")  # the same for all, or large


def measure(run: Path, data: str, limit: int) -> dict[str, Any]:
    """Return both results of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        export = shutil.copytree(find_export(run), Path(scratch) / "export")
        grounded = json.loads(ground(export, data, name="films", limit=limit).read_text())
        separated = json.loads(measure_separability(export, data, name="films", limit=limit).read_text())
    print(f"{run.name}\n\n{format_grounding(grounded)}\n\n{format_separability(separated)}\n", flush=True)
    return {
        "weights": separated["provenance"]["weights"],
        "grounding": {name: value for name, value in grounded.items() if name not in LEFT_OUT},
        "separability": {name: value for name, value in separated.items() if name not in LEFT_OUT},
    }


def tables(result: Mapping[str, Any]) -> str:
    """Return a result as the two tables of docs/results/instruments.md, in percent."""
    runs = result["runs"]
    first = next(iter(runs.values()))
    lines = [_row("", *runs, "uniform map"), _row("---", *["---"] * (len(runs) + 1))]
    for label, part, key, plain in GROUNDING:
        values = [_percent(run["grounding"][part], key) for run in runs.values()]
        lines.append(_row(label, *values, _percent(first["grounding"][part], plain) if plain else ""))
    heads = [_best_head(run["grounding"]["heads"]["question"]["inside"]) for run in runs.values()]
    lines.append(_row("question: head with most inside", *heads, ""))
    lines += ["", _row("", *runs, "chance", "position only"), _row("---", *["---"] * (len(runs) + 2))]
    for task in first["separability"]["chance"]:
        chance = first["separability"]["chance"][task]
        for place, block in enumerate(first["separability"]["blocks"]):
            name = f"{task}: probe, block {block['block']}{' after W' if block['steered'] else ''}"
            values = [_percent(run["separability"]["blocks"][place][task], "probe") for run in runs.values()]
            lines.append(_row(name, *values, _percent(chance, "probe"), _percent(chance, "position")))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(values: Mapping[str, float], key: str) -> str:
    text = f"{100 * values[key]:.1f}"
    if f"{key}_low" in values:
        text += f" [{100 * values[f'{key}_low']:.1f}, {100 * values[f'{key}_high']:.1f}]"
    return text


def _best_head(inside: Sequence[Sequence[float]]) -> str:
    value, block, head = max((value, block, head) for block, row in enumerate(inside) for head, value in enumerate(row))
    return f"block {block}, head {head}: {100 * value:.1f}"


def rounded(value: Any) -> Any:
    """Return a result with its numbers at four digits after the point."""
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Measure each run, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=RUN")
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="samples with boxes, and images")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    arms = {name: Path(run) for name, _, run in (text.partition("=") for text in options.runs)}
    named = " ".join(f"{name}=runs/{run.name}" for name, run in arms.items())
    place = "/".join(Path(options.data).parts[-2:])
    result = {
        "command": f"python -m tools.benchmarks.instruments --runs {named} --data data/{place} --limit {options.limit}",
        "note": "one seed of each arm",
        "limit": options.limit,
        "runs": {name: measure(run, options.data, options.limit) for name, run in arms.items()},
    }
    options.output.write_text(json.dumps(rounded(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
