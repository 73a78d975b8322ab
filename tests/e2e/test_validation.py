"""Evaluation on held-out shards while training: it changes no training number, and keeps the best checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medalign.data.shards.index import ShardIndex
from medalign.observability.rows import read_rows
from tests.e2e.conftest import EXACT, losses, train

# No dropout, because its masks depend on the rank: runs on one and two ranks then have the same weights.
WORDS = ("--train.evaluate_every", "3", "--student.lora.dropout", "0", "--checkpoint.interval", "5")
TERMS = ("total", "language", "similarity", "attention")


@pytest.fixture(scope="module")
def runs(recipe: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on one rank, on two ranks (one of which has one micro-batch less), and without evaluation."""
    root = tmp_path_factory.mktemp("validation")
    assert len(ShardIndex.open(shards / "val")) % 4, "the last micro-batch should be for one rank only"
    held_out = ("--data.validation", str(shards / "val"))
    train(recipe, root / "one", *WORDS, *held_out)
    train(recipe, root / "two", *WORDS, *held_out, world=2)
    train(recipe, root / "without", *WORDS, "--train.evaluate_every", "0")
    return {name: root / name for name in ("one", "two", "without")}


def validation(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "validation/loss/total" in row]


def test_every_term_is_evaluated_at_intervals_and_at_the_end(runs):
    rows = validation(runs["one"])
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert all(row[f"validation/loss/{term}"] > 0 for row in rows for term in TERMS)


def test_two_ranks_report_the_losses_of_one(runs):
    """The weights differ by float32 sums in another order."""
    for one, two in zip(validation(runs["one"]), validation(runs["two"]), strict=True):
        for term in TERMS:
            name = f"validation/loss/{term}"
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_evaluation_does_not_change_the_training(runs):
    rows = [row for row in read_rows(runs["one"] / "metrics.jsonl") if "loss/total" in row]
    assert [(row["step"], *(row[name] for name in EXACT)) for row in rows] == losses(runs["without"])


def test_the_best_checkpoint_is_recorded_and_kept(runs):
    for name in ("one", "two"):
        checkpoints = runs[name] / "checkpoints"
        best = min(validation(runs[name]), key=lambda row: row["validation/loss/total"])
        folder = checkpoints / (checkpoints / "best").read_text().strip()
        assert folder.name == f"step-{best['step']:06d}"
        state = json.loads((folder / "progress.json").read_text())
        assert (state["best_step"], state["best_loss"]) == (best["step"], best["validation/loss/total"])
    assert not (runs["without"] / "checkpoints" / "best").exists()


def test_other_held_out_shards_give_another_best_checkpoint(recipe, runs, shards, tmp_path):
    """The finished run is evaluated again, and the loss on the earlier shards is forgotten."""
    folder = tmp_path / "run"
    shutil.copytree(runs["one"], folder)
    (output,) = train(recipe, folder, *WORDS, "--data.validation", str(shards / "train"))
    assert "a new one is chosen from this step on" in " ".join(output.split())
    state = json.loads((folder / "checkpoints" / "step-000008" / "progress.json").read_text())
    assert state["best_step"] == 8 and (folder / "checkpoints" / "best").read_text() == "step-000008\n"
    assert state["held_out"] == list(ShardIndex.open(shards / "train").fingerprint())
