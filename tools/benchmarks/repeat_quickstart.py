"""Repeats the quickstart with several seeds: every score of every arm, and the differences between arms.

    python -m tools.benchmarks.repeat_quickstart --seeds 0 1 2
    python -m tools.benchmarks.repeat_quickstart --seeds 0 1 2 --arms steered     # this arm only

Runs tools/quickstart.sh once per seed (finished arms are not run again) and writes results/quickstart.json. With
--arms, the scores of the other arms are taken from that file: on one machine, a seed repeats to the last digit. A seed
determines the films, their order and the initial adapters; the base student and the teacher stay the same. Scores and
differences have a 95 % t-interval over the seeds. The differences are paired: both arms of a seed see the same films in
the same order and answer the same questions.

The arm "blind" is not a model. It gives each question its most common answer in the training split, which is the score
without the film. Two arms are controls: "steered" has the language loss and W but no teacher, and "untrained" is
MedAlign with a teacher of random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("base", "language", "steered", "untrained", "medalign")
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
PAIRS = (("medalign", "language"), ("medalign", "steered"), ("medalign", "untrained"))
COMPARED = ("closed_accuracy", "open_exact", "bleu")
# Settings in which the arms differ. Every other setting must be the same in all arms.
ARM_SETTINGS = {
    "run.dir",
    "train.steps",
    "losses.alpha",
    "losses.beta",
    "student.steering",
    "teacher.random_weights_seed",
}

Scores = Mapping[str, Any]
BySeed = Mapping[int, Mapping[str, Scores]]  # seed -> arm -> scores


def questions(split: Path) -> Iterator[dict[str, str]]:
    """Yield the question-answer samples of a folder of shards."""
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    sample = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                    if sample["task"] == "vqa":
                        yield sample


def blind(data: Path) -> dict[str, float]:
    """Return the exact-match scores of the most common training answer to each question."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in questions(data / "train"):
        seen[sample["question"]][sample["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in questions(data / "val"):
        commonest = seen[sample["question"]].most_common(1)
        right[sample["answer_type"]].append(bool(commonest) and commonest[0][0] == sample["answer"])
    return {"closed_accuracy": statistics.mean(right["closed"]), "open_exact": statistics.mean(right["open"])}


def scores_file(folder: Path, arm: str) -> Path:
    """Return the file with the scores of an arm."""
    return folder / arm / "evaluation/val/scores.json"


def waiting(run: Path) -> dict[str, float]:
    """Return the share of the time that the ranks waited for data, over all logged steps; empty without a step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    shares = [row["speed/data_wait_share"] for row in rows]
    return {"data_wait_share": statistics.mean(shares)} if shares else {}


def run(seed: int, folder: Path, arms: Sequence[str] = ARMS) -> dict[str, Scores]:
    """Return the scores of these arms and of "blind" for one seed. Only arms without scores are trained."""
    missing = [arm for arm in arms if not scores_file(folder, arm).is_file()]
    if missing:
        environment = os.environ | {"SEED": str(seed), "ARMS": " ".join(missing)}
        subprocess.run(["bash", "tools/quickstart.sh", str(folder)], cwd=ROOT, env=environment, check=True)
    scores = {arm: json.loads(scores_file(folder, arm).read_text()) | waiting(folder / arm) for arm in arms}
    check(folder, scores)
    return scores | {"blind": blind(folder / "data")}


def stored(path: Path, seeds: Sequence[int], arms: Sequence[str]) -> dict[int, dict[str, Scores]]:
    """Return the scores that an earlier call wrote for these seeds and arms. Exit if the file does not contain them."""
    facts = json.loads(path.read_text()) if path.is_file() else {}
    lacking = [arm for arm in arms if arm not in facts.get("arms", {})]
    if facts.get("seeds") != list(seeds) or lacking:
        sys.exit(f"{path} does not contain {', '.join(lacking or arms)} for seeds {list(seeds)}; run all arms")
    return {
        seed: {
            arm: {name: found["seeds"][place] for name, found in facts["arms"][arm].items()} | {"n": asked}
            for arm in arms
        }
        for place, (seed, asked) in enumerate(zip(seeds, facts["questions"], strict=True))
    }


def check(folder: Path, scores: Mapping[str, Scores]) -> None:
    """Exit if arms answered different questions; print settings in which finished arms differ."""
    asked = {arm: one["n"] for arm, one in scores.items()}
    if len(set(asked.values())) > 1:
        sys.exit(f"{folder}: the arms answered different questions ({asked}); evaluate them again on {folder}/data/val")
    settings = {arm: common_settings(folder / arm) for arm in scores}
    for line in sorted(set().union(*settings.values())):
        arms = [arm for arm, lines in settings.items() if line in lines]
        if len(arms) < len(settings):
            only = ", ".join(arms)
            print(f"{folder}: {line} only in {only}; train the arms with the same settings", file=sys.stderr)


def common_settings(run: Path) -> set[str]:
    """Return the settings of a run as "section.key: value", without those in which the arms differ."""
    section, found = "", set()
    for line in (run / "config.yaml").read_text().splitlines():
        if line.startswith(" "):
            found.add(f"{section}.{line.strip()}")
        else:
            section = line.rstrip(":")
    return {line for line in found if line.split(":")[0] not in ARM_SETTINGS}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, the standard deviation and the 95 % t-interval over the seeds; for one seed only the mean."""
    mean = statistics.mean(values)
    found: dict[str, Any] = {"mean": round(mean, 4)}
    if len(values) > 1:
        spread = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
        found |= {"spread": round(spread, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}
    return found | {"seeds": list(values)}


def table(by_seed: BySeed) -> dict[str, dict[str, Any]]:
    """Return arm -> score -> summary, without the scores that an arm does not have."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ("blind", *ARMS):
        columns = {name: [scores[arm][name] for scores in by_seed.values() if name in scores[arm]] for name in SCORES}
        found[arm] = {name: summary(values) for name, values in columns.items() if values}
    return found


def differences(by_seed: BySeed) -> dict[str, dict[str, Any]]:
    """Return "medalign - language" -> score -> summary of the differences over the seeds that have both scores."""
    found: dict[str, dict[str, Any]] = {}
    for arm, other in PAIRS:
        found[f"{arm} - {other}"] = {
            name: summary(values)
            for name in COMPARED
            if (
                values := [
                    round(scores[arm][name] - scores[other][name], 12)  # 0.3 and not 0.30000000000000004
                    for scores in by_seed.values()
                    if name in scores[arm] and name in scores[other]
                ]
            )
        }
    return found


def as_text(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Format one line per row, with "mean [low, high]" per score."""

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return ""
        return f"{found['mean']:.3f}" + (f" [{found['low']:.3f}, {found['high']:.3f}]" if "low" in found else "")

    lines = [["", *names], *([row, *(cell(scores.get(name)) for name in names)] for row, scores in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """Run the arms of all seeds, print the tables and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to run; default: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--output", type=Path, default=ROOT / "tools/benchmarks/results/quickstart.json")
    options = parser.parse_args()
    others = [arm for arm in ARMS if arm not in options.arms]
    by_seed: dict[int, dict[str, Scores]] = stored(options.output, options.seeds, others) if others else {}
    for seed in options.seeds:
        found = run(seed, options.folder / f"seed-{seed}", options.arms)
        by_seed[seed] = {**by_seed.get(seed, {}), **found}
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.repeat_quickstart", *sys.argv[1:]]),
        "seeds": options.seeds,
        "questions": [next(iter(scores.values()))["n"] for scores in by_seed.values()],
        "spread": "standard deviation over the seeds",
        "low, high": "95 % t-interval over the seeds",
        "arms": table(by_seed),
        "differences": differences(by_seed),
    }
    options.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(as_text(facts["arms"], SCORES), as_text(facts["differences"], COMPARED), sep="\n\n")


if __name__ == "__main__":
    main()
