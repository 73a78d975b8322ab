"""The quickstart's table with several seeds behind it: mean and spread of every score of every arm.

    python tools/repeat_quickstart.py --seeds 0 1 2

Runs tools/quickstart.sh once a seed (what is finished is not run again) and writes tools/results/quickstart.json. A
seed fixes the films, the order and the start of the adapters; the base student and the teacher stay the same. The
arm "blind" is no model: it gives each question the commonest answer that it has in the training split, which is what
can be had without looking at the film; the arm "untrained" is a control, MedAlign from a teacher of random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("base", "language", "untrained", "medalign")
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
    "data_wait_share",
)


def questions(split: Path) -> Iterator[dict[str, str]]:
    """The question-answer samples of a folder of shards."""
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    sample = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                    if sample["task"] == "vqa":
                        yield sample


def blind(data: Path) -> dict[str, float]:
    """Exact-match scores of the commonest training answer to each question."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in questions(data / "train"):
        seen[sample["question"]][sample["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in questions(data / "val"):
        commonest = seen[sample["question"]].most_common(1)
        right[sample["answer_type"]].append(bool(commonest) and commonest[0][0] == sample["answer"])
    return {"closed_accuracy": statistics.mean(right["closed"]), "open_exact": statistics.mean(right["open"])}


def scores_file(folder: Path, arm: str) -> Path:
    return folder / arm / "evaluation/val/scores.json"


def waiting(run: Path) -> dict[str, float]:
    """The share of the time, over all logged steps of a run, that its ranks waited for data; none if it had no step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    shares = [row["speed/data_wait_share"] for row in rows]
    return {"data_wait_share": statistics.mean(shares)} if shares else {}


def run(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The scores of each arm for one seed."""
    missing = [arm for arm in ARMS if not scores_file(folder, arm).is_file()]
    if missing:
        environment = os.environ | {"SEED": str(seed), "ARMS": " ".join(missing)}
        subprocess.run(["bash", "tools/quickstart.sh", str(folder)], cwd=ROOT, env=environment, check=True)
    scores = {arm: json.loads(scores_file(folder, arm).read_text()) | waiting(folder / arm) for arm in ARMS}
    return scores | {"blind": blind(folder / "data")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--output", type=Path, default=ROOT / "tools/results/quickstart.json")
    options = parser.parse_args()
    by_seed = {seed: run(seed, options.folder / f"seed-{seed}") for seed in options.seeds}
    table: dict[str, dict[str, Any]] = {}
    for arm in ("blind", *ARMS):
        table[arm] = {}
        for name in SCORES:
            values = [scores[arm][name] for scores in by_seed.values() if name in scores[arm]]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table[arm][name] = {"mean": round(statistics.mean(values), 4), "spread": round(spread, 4), "seeds": values}
    facts = {
        "command": shlex.join(["python", "tools/repeat_quickstart.py", *sys.argv[1:]]),
        "questions": [scores["base"]["n"] for scores in by_seed.values()],
        "spread": "standard deviation over the seeds",
    }
    options.output.write_text(json.dumps(facts | {"arms": table}, indent=2) + "\n")
    print(" " * 18, *(f"{arm:>16}" for arm in table))
    for name in SCORES:
        cells = [scores.get(name) for scores in table.values()]
        print(f"{name:18}", *(f"{c['mean']:8.3f} ± {c['spread']:.3f}" if c else " " * 16 for c in cells))


if __name__ == "__main__":
    main()
