"""Injects faults into a small run until there are enough trials.

python -m tools.faults --trials 100 --ranks 1 --work runs/faults
python -m tools.faults --trials 50 --ranks 2 --work runs/faults

The trials of a folder are kept in `trials.jsonl`: the same command continues where it was interrupted, and a larger
number adds to them. A trial has survived once the run, started again by the same command, has logged its next step, and
every step so far equals that of a run without faults: losses, norm of the gradient and learning rate, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import medalign
from medalign.run_folder import RunFolder
from tools.faults.injection import applicable, expected_status, inject
from tools.faults.run_under_test import STEPS, NotSurvivedError, RunUnderTest, write_recipe
from tools.faults.starts import Start
from tools.faults.summary import Trial, read_trials, summarize, table

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "faults.json"
_EARLY = 0.2  # share of faults in the start of the run
_EARLY_SECONDS = 5.0


class Campaign:
    """The trials of a folder.

    Args:
        work: folder of the recipe, the runs and the trials.
        world: number of ranks.
        seed: of all draws.
    """

    def __init__(self, work: Path, world: int, seed: int) -> None:
        self.work, self.world, self.seed = work.resolve(), world, seed
        self.work.mkdir(parents=True, exist_ok=True)
        self.recipe = write_recipe(self.work)
        self.path = self.work / "trials.jsonl"
        self.unsettled: list[Trial] = []

    def count(self) -> int:
        """Number of trials on this number of ranks."""
        return sum(trial["ranks"] == self.world for trial in read_trials(self.path))

    def run(self, trials: int) -> None:
        """Inject faults until there are this many trials; those that the last ones wait for are settled too."""
        number = 0
        while self.count() < trials or self.unsettled:
            run = self.open_run(number)
            number += 1
            if len(run.rows()) < STEPS:
                self.end_again_and_again(run, trials)

    def open_run(self, number: int) -> RunUnderTest:
        """Open a run with a seed of its own, after its uninterrupted twin."""
        folder, seed = self.work / f"{self.world}-ranks", self.seed + number
        whole = RunUnderTest(self.recipe, folder / f"whole-{number}", self.world, seed)
        reference = whole.rows() if len(whole.rows()) == STEPS else whole.finish()
        return RunUnderTest(self.recipe, folder / f"faults-{number}", self.world, seed, reference)

    def end_again_and_again(self, run: RunUnderTest, trials: int) -> None:
        """Inject faults until the run has reached its end, or there are enough trials."""
        while True:
            draw = random.Random(f"{self.seed} {self.world} {self.count() + len(self.unsettled)}")
            start = run.start()
            try:
                early = draw.random() < _EARLY
                if early:
                    time.sleep(draw.uniform(0.0, _EARLY_SECONDS))
                else:
                    over = run.wait_for_rows(start, 1 + draw.randrange(6))
                    if over and not (start.wait(60.0) and set(start.kill()) == {0}):
                        raise NotSurvivedError(f"exit status {start.kill()}: {run.tail()}")
                    self.settle()
                    if over or self.count() >= trials:
                        return
                    time.sleep(draw.uniform(0.0, 0.3))
                self.inject(run, draw, start, early)
            except NotSurvivedError as error:
                self.settle(str(error))
                raise
            finally:
                start.kill()

    def inject(self, run: RunUnderTest, draw: random.Random, start: Start, early: bool) -> None:
        """Inject one fault; the next start settles whether the run has survived it."""
        kind = draw.choice(applicable(self.world, early, RunFolder(run.folder)))
        step = len(run.rows())
        found = inject(kind, start, RunFolder(run.folder), draw)
        if set(found["status"]) == {0}:
            return  # the run had ended before
        self.unsettled.append(
            {"ranks": self.world, "kind": kind, "in": "start" if early else "training", "step": step, **found}
        )
        print(json.dumps(self.unsettled[-1]), flush=True)
        if not expected_status(kind, found["status"], early):
            raise NotSurvivedError(f"exit status {found['status']} after {kind}: {run.tail()}")

    def settle(self, fault: str = "") -> None:
        """Record the trials that were waiting for the next start."""
        with self.path.open("a", encoding="utf-8") as file:
            for trial in self.unsettled:
                file.write(json.dumps({**trial, "survived": not fault, **({"fault": fault} if fault else {})}) + "\n")
        self.unsettled.clear()


def main() -> int:
    """Run the trials and write their summary. Returns 1 if a run has not survived."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="trials in the folder (default %(default)s)"
    )
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="ranks of the run (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs and the trials")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="summary (default %(default)s)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("medalign").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the ranks end with this process
    campaign = Campaign(arguments.work, arguments.ranks, arguments.seed)
    try:
        campaign.run(arguments.trials)
    except NotSurvivedError as error:
        print(f"error: {error}", file=sys.stderr)
    about = {"medalign": medalign.__version__, "torch": torch.__version__, "cores": os.cpu_count(), "steps": STEPS}
    summary = summarize(read_trials(campaign.path), about)
    arguments.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(table(summary))
    return int(summary["survived"] != summary["trials"])


if __name__ == "__main__":
    sys.exit(main())
