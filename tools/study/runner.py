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
from medalign.run_folder import RunFolder
from tools.study.arms import BASE, FILMS, TUNING_SEED, Run, chosen, plan
from tools.study.probes import PROBES, write_probes
from tools.study.results_file import COMMONEST, PRIMARY, collect, commonest_answer, read_results

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
        place = f"runs/{run.name}"
        settings = [*run.settings, *self.common, "--train.micro_batch_size=32", "--engine.deepspeed=cpu"]
        settings += ["--engine.start_timeout=0", "--engine.step_timeout=0", "--log.wandb=off"]
        train = ["train", "phantom", f"--data.train={self._training(run)}", f"--run.dir={place}", *settings]
        return [train, ["evaluate", place, "--data", f"data/{run.held_out}/val", "--name", run.held_out]]

    def do(self, run: Run) -> None:
        """Draw the films that a run needs, train, generate the answers and write the result file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._draw(f"data/train-{run.seed}-{self._films(run)}", self._films(run), 1, run.seed, 0.25)
        self._draw("data/test", 1, self.test_films, 90001, 0.5)
        self._draw("data/development", 1, self.development_films, 90002, 0.5)
        commit = self.place(run) / _COMMIT
        if not commit.is_file():
            write_text(commit, _checkout())
        for words in self.commands(run):
            self.execute(words, self.folder)
        self.report(run)

    def report(self, run: Run) -> None:
        """Write the result file of a finished run."""
        commands = [shlex.join([COMMAND, *words]) for words in self.commands(run)]
        commit = (self.place(run) / _COMMIT).read_text(encoding="utf-8")
        found = collect(run, self.place(run), commands, commit)
        if run.arm == BASE:
            found[COMMONEST] = commonest_answer(self.folder / self._training(run), self.folder / "data/test/val")
        write_text(self.results / f"{run.name}.json", json.dumps(found, indent=1) + "\n")

    def place(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.name

    def _training(self, run: Run) -> str:
        return f"data/train-{run.seed}-{self._films(run)}/train"

    def _films(self, run: Run) -> int:
        return self.train_films if run.films == FILMS else run.films

    def _draw(self, output: str, train: int, val: int, seed: int, reports: float) -> None:
        """Write films unless they are there; the validation split is written last."""
        if not (self.folder / output / "val" / "index.jsonl").is_file():
            words = ["phantom", f"--output={output}", f"--train={train}", f"--val={val}", f"--seed={seed}"]
            self.execute([*words, f"--reports={reports}"], self.folder)


def finished(study: Study) -> Iterator[Run]:
    """Yield the runs in the study's folder whose answers are complete, in the order of the plan."""
    for planned in plan():
        run = chosen(planned, study.trial_scores())
        if run is not None and RunFolder(study.place(run)).evaluation(run.held_out).scores.is_file():
            yield run


def collect_again(study: Study) -> list[str]:
    """Write the result files of all finished runs again. Returns their names."""
    done = []
    for run in finished(study):
        study.report(run)
        done.append(run.name)
    return done


def probe(study: Study) -> list[str]:
    """Ask the finished runs the test questions on other films, and write their result files. Returns their names."""
    done = []
    for run in finished(study):
        if run.trial:
            study.report(run)  # the learning rates of later runs are read from it
            continue
        write_probes(study.folder / "data/test/val", study.folder / "data/probes")
        for name in PROBES:
            if not RunFolder(study.place(run)).evaluation(name).scores.is_file():
                words = ["evaluate", f"runs/{run.name}", "--data", f"data/probes/{name}", "--name", name]
                study.execute(words, study.folder)
        study.report(run)
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
