"""The small run that is ended again and again, and the uninterrupted one that it must equal."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from medalign import phantom
from medalign.observability.rows import read_rows
from medalign.run_folder import RunFolder
from tests import tiny
from tools.faults.injection import SAVE_TIMEOUT, STEP_TIMEOUT
from tools.faults.starts import Start

STEPS = 160
_EXACT = ("loss/total", "loss/language", "loss/similarity", "loss/attention", "optim/grad_norm", "optim/lr")
_PATIENCE = 300.0  # seconds for a start to log its first row


class NotSurvivedError(Exception):
    """A start did not continue, or not with the numbers of the uninterrupted run."""


def write_recipe(folder: Path) -> Path:
    """Write shards, tiny models and a recipe into the folder, unless they are there; returns the recipe."""
    recipe = folder / "tiny.yaml"
    if recipe.is_file():
        return recipe
    phantom.write_phantoms(folder / "shards", 16, 1, 0)
    student, teacher = tiny.save_student(folder / "student"), tiny.save_teacher(folder / "teacher")
    recipe.write_text(
        f"student: {{path: {student}, layer: 2, lora: {{rank: 4, dropout: 0.1}}}}\n"
        f"teacher: {{path: {teacher}}}\n"
        f"data: {{train: {folder}/shards/train, max_length: 220}}\n"
        f"train: {{steps: {STEPS}, batch_size: 4, micro_batch_size: 2, lr: 1.0e-3}}\n"
        f"engine: {{deepspeed: cpu, step_timeout: {STEP_TIMEOUT}, start_timeout: {SAVE_TIMEOUT}}}\n"
        "checkpoint: {interval: 4, save_total_limit: 3}\n"
        "log: {interval: 1, wandb: 'off'}\n"
    )
    return recipe


@dataclass
class RunUnderTest:
    """One run with its folder.

    Args:
        recipe: what is trained.
        folder: the run's folder.
        world: number of ranks.
        seed: seed of the run.
        reference: the rows of the uninterrupted run.
    """

    recipe: Path
    folder: Path
    world: int
    seed: int
    reference: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What the ranks have printed, of all starts."""
        return self.folder.with_suffix(".log")

    def start(self) -> Start:
        """Start or continue the run."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["train", str(self.recipe), "--run.dir", str(self.folder), "--run.seed", str(self.seed)]
        return Start(words, self.world, self.log)

    def rows(self) -> list[tuple[float, ...]]:
        """Return the values of each step that must be equal to the last bit."""
        path = RunFolder(self.folder).metrics
        found = read_rows(path) if path.is_file() else []
        return [(row["step"], *(row[name] for name in _EXACT)) for row in found]

    def finish(self) -> list[tuple[float, ...]]:
        """Run to the end without a fault; returns all rows."""
        start = self.start()
        try:
            start.wait(3600.0)
        finally:
            status = start.kill()
        if set(status) != {0}:
            raise NotSurvivedError(f"exit status {status}: {self.tail()}")
        return self.rows()

    def wait_for_rows(self, start: Start, count: int) -> bool:
        """Wait until this start has logged some rows; True if it has ended before.

        Raises:
            NotSurvivedError: it logs no row in time, or a row differs from that of the uninterrupted run.
        """
        path, deadline = RunFolder(self.folder).metrics, time.monotonic() + _PATIENCE
        first: int | None = None
        while not start.ended():
            if first is None and path.is_file() and path.stat().st_mtime > start.began and path.stat().st_size:
                first = len(self.rows())
            if first is not None and len(self.rows()) >= first + count:
                break
            if time.monotonic() > deadline:
                raise NotSurvivedError(f"no row after {_PATIENCE:.0f} s: {self.tail()}")
            time.sleep(0.05)
        self.require_equal()
        return start.ended()

    def require_equal(self) -> None:
        """Compare every row so far.

        Raises:
            NotSurvivedError: one differs from that of the uninterrupted run.
        """
        rows = self.rows()
        for mine, other in zip(rows, self.reference, strict=False):
            if mine != other:
                raise NotSurvivedError(f"step {mine[0]} differs: {json.dumps([mine, other])}")
        if [row[0] for row in rows] != list(range(1, len(rows) + 1)):
            raise NotSurvivedError(f"a step is missing or logged twice: {[row[0] for row in rows]}")

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.is_file() else "nothing was printed"
