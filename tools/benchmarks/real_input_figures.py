"""Collects the figures of a run of tools/benchmarks/real_input.sh into one JSON file.

python -m tools.benchmarks.real_input_figures runs/real --output tools/benchmarks/results/real_input.json
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from jsonargparse import auto_cli

from medalign.observability.rows import read_rows

ROWS = 5  # logged steps at each end over which a loss is averaged


def gather(folder: Path) -> dict:
    """Collect counts of packed, refused, replaced and truncated samples, first and last losses, and scores."""
    rows = read_rows(folder / "run/metrics.jsonl")
    packed = {name: json.loads((folder / name / "conversion.json").read_text()) for name in ("vqa", "reports")}
    losses = {
        name: [round(statistics.mean(row[name] for row in part), 4) for part in (rows[:ROWS], rows[-ROWS:])]
        for name in rows[-1]
        if name.startswith("loss/")
    }
    scores = {name: json.loads((folder / f"run/evaluation/{name}/scores.json").read_text()) for name in packed}
    for one in scores.values():
        one.pop("data")  # an absolute path
    return {
        "command": "bash tools/benchmarks/real_input.sh VQA_FOLDER REPORT_FOLDER",
        "packed": {name: {"splits": one["splits"], "refused": one["skipped"]} for name, one in packed.items()},
        "steps": rows[-1]["step"],
        "replaced": rows[-1]["data/skipped"],
        "cut": rows[-1]["data/truncated"],
        f"losses_first_and_last_{ROWS}_rows": losses,
        "waiting_for_data": round(statistics.median(row["speed/data_wait_share"] for row in rows), 4),
        "scores": scores,
    }


def main(folder: Path, output: Path | None = None):
    """Collect the figures of a run on real input.

    Args:
        folder: the output folder of tools/benchmarks/real_input.sh.
        output: JSON file; default FOLDER/figures.json.
    """
    path = output or folder / "figures.json"
    path.write_text(json.dumps(gather(folder), indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    auto_cli(main)
