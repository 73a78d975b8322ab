"""Mixture, temperature and beta of the text-conditioned arm T, chosen on the development set before T runs.

    python -m tools.study.text_tuning --folder runs/study

Trains one student for each candidate with the tuning seed and the recipe's learning rate, scores it on the development
set, and writes `text_tuning.json` beside this file with the choice by the rule that protocol.md registers. Interrupted,
it resumes. The films are those of the study in the same folder.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from medalign.observability.files import write_text
from tools.study.arms import RATES, TUNING_SEED, Run
from tools.study.results_file import PRIMARY, collect, read_results
from tools.study.runner import RESULTS, Study, call

RESULT = Path(__file__).with_suffix(".json")
SCORES = (PRIMARY, "asked_denser", "asked_pointing", "map_change", "attention_inside", "pointing_hits", "bleu")
REFERENCE = Run("B", TUNING_SEED, RATES[0], trial=True)
ALLOWED_LOSS = 0.01  # of the primary metric, against the trial of B


def candidate(weight: float, beta: float = 1.0, temperature: float = 0.05) -> tuple[str, ...]:
    """Return the settings of a candidate."""
    text = (f"--teacher.text_weight={weight:g}", f"--teacher.text_temperature={temperature:g}")
    return (*text, "--teacher.text_absent_weight=1", f"--losses.beta={beta:g}")


CANDIDATES: dict[str, tuple[str, ...]] = {
    "half": candidate(0.5),
    "half, beta 0.3": candidate(0.5, beta=0.3),
    "three quarters": candidate(0.75),
    "whole, beta 0.3": candidate(1.0, beta=0.3),
    "half, temperature 0.1": candidate(0.5, temperature=0.1),
    "half, temperature 0.025": candidate(0.5, temperature=0.025),
}


def main(folder: Path, output: Path = RESULT) -> None:
    """Do what is missing, and write the result.

    Args:
        folder: of the study.
        output: JSON file to write.
    """
    folder = folder.resolve()
    rows = {}
    for name, settings in CANDIDATES.items():
        run = folder / "runs" / f"text-{name.replace(', ', '-').replace(' ', '_')}"
        for words in commands(run, settings):
            call(words, folder)
        found = collect(REFERENCE, run, [], "")["scores"]
        rows[name] = {"settings": shlex.join(settings), **{key: found[key] for key in SCORES}}
        sys.stdout.write(f"{name}: {rows[name]}\n")
    reference = read_results(RESULTS)[REFERENCE.name]["scores"]
    result = {
        "command": shlex.join(["python", "-m", "tools.study.text_tuning", "--folder", "runs/study"]),
        "reference": {key: reference[key] for key in SCORES},
        "candidates": rows,
        "chosen": choose(rows, reference[PRIMARY]),
    }
    write_text(output, json.dumps(result, indent=1) + "\n")


def commands(run: Path, settings: tuple[str, ...]) -> list[list[str]]:
    """Return the words of `medalign` for a candidate: those of the trial of B at the same place, and its settings."""
    train, evaluate = Study(run.parent.parent).commands(REFERENCE)
    place = f"runs/{REFERENCE.name}"
    changed = [word.replace(place, f"runs/{run.name}") for word in train]
    return [[*changed, *settings], [word.replace(place, f"runs/{run.name}") for word in evaluate]]


def choose(rows: Mapping[str, Mapping[str, Any]], reference: float) -> str:
    """Return the candidate whose attention follows the question most, among those that cost no answers.

    Args:
        rows: the scores of each candidate.
        reference: the primary metric of the trial of B.
    """
    kept = [name for name, row in rows.items() if row[PRIMARY] >= reference - ALLOWED_LOSS]
    return max(kept or rows, key=lambda name: rows[name]["asked_denser"])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
