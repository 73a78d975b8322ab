"""A small run on phantoms, created once: shards, a recipe for the tiny models, a trained run."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from medalign.observability.rows import read_rows
from tests.distributed.ranks import TIMEOUT, finish, start

EXACT = ("loss/total", "loss/language", "loss/similarity", "loss/attention", "optim/grad_norm", "optim/lr")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms: train/ and val/."""
    from medalign import phantom

    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantoms(folder, 16, 6, 0)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path, student_folder: Path, teacher_folder: Path) -> Path:
    """A recipe of eight small steps on the tiny models."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"student: {{path: {student_folder}, layer: 2, lora: {{rank: 4, dropout: 0.1}}}}\n"
        f"teacher: {{path: {teacher_folder}}}\n"
        f"data: {{train: {shards}/train, max_length: 220}}\n"
        "train: {steps: 8, batch_size: 4, micro_batch_size: 2, lr: 1.0e-3}\n"
        "engine: {deepspeed: cpu}\n"
        "checkpoint: {interval: 3, save_total_limit: 2, asynchronous: false}\n"  # complete before the next row
        "log: {interval: 1}\n"
    )
    return path


def train(recipe: Path, folder: Path, *overrides: str, world: int = 1) -> list[str]:
    """Train with this number of ranks; return the output of each rank."""
    return finish(start(command(recipe, folder, overrides), world))


def command(recipe: Path, folder: Path, overrides: Sequence[str] = ()) -> list[str]:
    return ["-m", "medalign", "train", str(recipe), "--run.dir", str(folder), *overrides]


def kill_at(recipe: Path, folder: Path, step: int, *overrides: str, world: int = 1) -> None:
    """Start a run, and kill it with SIGKILL once it has written the row of `step`."""
    processes = start(command(recipe, folder, overrides), world)
    rows = folder / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (rows.is_file() and rows.read_text().count("\n") >= step):
            assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, "ended before the kill"
            time.sleep(0.01)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()


def losses(folder: Path) -> list[tuple]:
    """Return the values of each step that must be bit-identical in two runs."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss/total" in row]  # and not of a validation
    return [(row["step"], *(row[name] for name in EXACT)) for row in rows]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, folder)
    return folder
