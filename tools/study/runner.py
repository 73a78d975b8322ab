"""Does the missing runs: films, training, answers, result file. Interrupted, it resumes where it stopped."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medalign.observability.files import write_text
from tools.study.arms import BASE, FILMS, TUNING_SEED, Run, chosen, plan
from tools.study.results_file import PRIMARY, collect, read_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
COMMAND = "medalign"
_COMMIT = "commit"  # file in the folder of a run

log = logging.getLogger("medalign")

Words = Sequence[str]


def call(words: Words, folder: Path) -> None:
    """Run `medalign` with this checkout's package in a folder. Raises CalledProcessError if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", COMMAND, *words], cwd=folder, env=environment, check=True)


@dataclass(frozen=True)
class Study:
    """Where the study is kept, and how its commands are run.

    Attributes:
        folder: films and runs; can be deleted when all is reported.
        results: the result files.
        test_films: films of the test set.
        development_films: films of the development set.
        train_films: films of the training set of arms that do not have their own number.
        common: settings of all trainings.
        execute: runs a command of medalign in a folder.
    """

    folder: Path
    results: Path = RESULTS
    test_films: int = 400
    development_films: int = 200
    train_films: int = FILMS
    common: tuple[str, ...] = ()
    execute: Callable[[Words, Path], None] = call

    def run(self, arms: Collection[str], seeds: Collection[int]) -> None:
        """Do the missing runs of these arms and seeds in the order of the plan, with the trials that they need."""
        for run in self.missing(arms, seeds):
            log.info("== %s", run.name)
            self.do(run)

    def missing(self, arms: Collection[str], seeds: Collection[int]) -> Iterator[Run]:
        """Yield the next run without a result until there is none, each with the learning rate that its arm chose."""
        for planned in plan():
            wanted = planned.arm in arms and (planned.trial or planned.seed in seeds)
            if not wanted or (self.results / f"{planned.name}.json").is_file():
                continue
            run = chosen(planned, self.trial_scores())
            assert run is not None, f"{planned.name} comes after the trials of its arm"
            yield run

    def trial_scores(self) -> dict[str, float]:
        """Return the primary metric of each finished trial."""
        return {name: found["scores"][PRIMARY] for name, found in read_results(self.results).items() if found["trial"]}

    def commands(self, run: Run) -> list[list[str]]:
        """Return the words of `medalign` for a run, to be called in the study's folder."""
        place, held_out = f"runs/{run.name}", "development" if run.trial else "test"
        films = f"data/train-{run.seed}-{self._films(run)}"
        settings = [*run.settings, *self.common, "--train.micro_batch_size=32", "--engine.deepspeed=cpu"]
        settings += ["--engine.start_timeout=0", "--engine.step_timeout=0", "--log.wandb=off"]
        train = ["train", "phantom", f"--data.train={films}/train", f"--run.dir={place}", *settings]
        return [train, ["evaluate", place, "--data", f"data/{held_out}/val", "--name", held_out]]

    def do(self, run: Run) -> None:
        """Draw the films that a run needs, train, generate the answers and write the result file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._draw(f"data/train-{run.seed}-{self._films(run)}", self._films(run), 1, run.seed, 0.25)
        self._draw("data/test", 1, self.test_films, 90001, 0.5)
        self._draw("data/development", 1, self.development_films, 90002, 0.5)
        place, held_out = self.folder / "runs" / run.name, "development" if run.trial else "test"
        commit = place / _COMMIT
        if not commit.is_file():
            write_text(commit, _checkout())
        commands = self.commands(run)
        for words in commands:
            self.execute(words, self.folder)
        shown = [shlex.join([COMMAND, *words]) for words in commands]
        found = collect(run, place, held_out, shown, commit.read_text(encoding="utf-8"))
        write_text(self.results / f"{run.name}.json", json.dumps(found, indent=1) + "\n")

    def _films(self, run: Run) -> int:
        return self.train_films if run.films == FILMS else run.films

    def _draw(self, output: str, train: int, val: int, seed: int, reports: float) -> None:
        """Write films unless they are there; the validation split is written last."""
        if not (self.folder / output / "val" / "index.jsonl").is_file():
            words = ["phantom", f"--output={output}", f"--train={train}", f"--val={val}", f"--seed={seed}"]
            self.execute([*words, f"--reports={reports}"], self.folder)


def collect_again(study: Study) -> list[str]:
    """Write the result files of all finished runs in the study's folder again. Returns their names."""
    done = []
    for planned in plan():
        run = chosen(planned, study.trial_scores())
        place, held_out = study.folder / "runs" / planned.name, "development" if planned.trial else "test"
        if run is None or not (place / "evaluation" / held_out / "scores.json").is_file():
            continue
        shown = [shlex.join([COMMAND, *words]) for words in study.commands(run)]
        found = collect(run, place, held_out, shown, (place / _COMMIT).read_text(encoding="utf-8"))
        write_text(study.results / f"{run.name}.json", json.dumps(found, indent=1) + "\n")
        done.append(run.name)
    return done


def all_seeds() -> set[int]:
    """Return the seeds of the plan."""
    return {run.seed for run in plan()} - {TUNING_SEED}


def all_arms() -> list[str]:
    """Return the arms of the plan, in the order of their first run."""
    return list(dict.fromkeys(run.arm for run in plan() if run.arm != BASE))


def _checkout() -> str:
    """Return the commit of this checkout, marked if files were changed."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
