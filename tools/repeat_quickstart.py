"""The quickstart's table with several seeds behind it: mean and spread of every score of every arm.

    python tools/repeat_quickstart.py --seeds 0 1 2

Runs tools/quickstart.sh once a seed (a finished seed is not run again) and writes tools/results/quickstart.json. A
seed fixes the films, the order and the start of the adapters; the base student and the teacher stay the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("base", "language", "medalign")
SCORES = (
    "closed_accuracy",
    "closed_majority",
    "open_exact",
    "open_recall",
    "bleu",
    "rouge_l",
    "attention_inside",
    "box_area",
    "pointing_hits",
    "pointing_chance",
)


def run(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The scores of each arm for one seed."""
    if not (folder / "report.html").is_file():
        environment = os.environ | {"SEED": str(seed)}
        subprocess.run(["bash", "tools/quickstart.sh", str(folder)], cwd=ROOT, env=environment, check=True)
    return {arm: json.loads((folder / arm / "evaluation/val/scores.json").read_text()) for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--output", type=Path, default=ROOT / "tools/results/quickstart.json")
    options = parser.parse_args()
    by_seed = {seed: run(seed, options.folder / f"seed-{seed}") for seed in options.seeds}
    table = {}
    for arm in ARMS:
        table[arm] = {}
        for name in SCORES:
            values = [scores[arm][name] for scores in by_seed.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table[arm][name] = {"mean": round(statistics.mean(values), 4), "spread": round(spread, 4), "seeds": values}
    facts = {
        "command": shlex.join(["python", "tools/repeat_quickstart.py", *sys.argv[1:]]),
        "questions": [scores["base"]["n"] for scores in by_seed.values()],
        "spread": "standard deviation over the seeds",
    }
    options.output.write_text(json.dumps(facts | {"arms": table}, indent=2) + "\n")
    for name in SCORES:
        cells = [f"{table[arm][name]['mean']:8.3f} ± {table[arm][name]['spread']:.3f}" for arm in ARMS]
        print(f"{name:18}", *cells)


if __name__ == "__main__":
    main()
