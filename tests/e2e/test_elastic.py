"""A run is killed on two ranks in the middle of its epoch, resumed and killed on one, and finished on three."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medalign.observability.rows import read_rows
from tests.e2e.conftest import kill_at, train

# Six samples per step can be divided among one, two and three ranks. No dropout, because its masks depend on the rank.
CUT = ("--train.batch_size", "6", "--train.micro_batch_size", "1", "--student.lora.dropout", "0")
# All four parameter groups are trained, with different learning rates and weight decays.
RATE_WORDS = ("--train.lr", "1e-3", "--train.projector_lr", "1e-4", "--train.weight_decay", "0.1")
GROUPS = ("--student.train_projector", "true", "--student.query_mixture", "true", *RATE_WORDS)
STEPS = 9
LOSSES = ("loss/total", "loss/language", "loss/similarity", "loss/attention", "optim/grad_norm")
RATES = ("optim/lr", "optim/lr_mixture", "optim/lr_steering", "optim/lr_projector")


@pytest.fixture(scope="module", params=["cpu", "zero2"])
def runs(request, recipe, tmp_path_factory) -> tuple[Path, Path]:
    """A run on two ranks, and one that is killed on two, then on one, and finished on three; ZeRO-3 and ZeRO-2."""
    words = (*CUT, *GROUPS, "--train.steps", str(STEPS), "--engine.deepspeed", request.param)
    folder = tmp_path_factory.mktemp("elastic")
    whole, moved = folder / "whole", folder / "moved"
    train(recipe, whole, *words, world=2)
    for world, step, checkpoint in ((2, 4, "step-000003"), (1, 7, "step-000006")):
        kill_at(recipe, moved, step, *words, world=world)
        assert (moved / "checkpoints" / "latest").read_text().strip() == checkpoint
    output = train(recipe, moved, *words, world=3)[0]
    assert "resuming from" in output and "was written by 1 ranks: converting it for 3" in output
    return whole, moved


def column(folder: Path, name: str) -> list[float]:
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row[name] for row in rows]


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_are_those_of_the_uninterrupted_run(runs, name):
    """float32 sums in another order differ by about 1e-7 each."""
    whole, moved = runs
    assert column(moved, name) == pytest.approx(column(whole, name), rel=1e-5)


@pytest.mark.parametrize("name", RATES)
def test_each_group_keeps_its_own_learning_rate(runs, name):
    whole, moved = runs
    assert column(moved, name) == column(whole, name)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    export = folder / "checkpoints" / f"step-{STEPS:06d}" / "export"
    return load_file(export / "adapter_model.safetensors") | load_file(export / "medalign.safetensors")


def test_the_export_is_that_of_the_uninterrupted_run(runs):
    whole, moved = map(exported, runs)
    assert whole.keys() == moved.keys()
    for name, value in whole.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_last_checkpoint_is_of_three_ranks(runs):
    checkpoints = runs[1] / "checkpoints"
    assert not list(checkpoints.glob(".partial-*"))
    assert '"ranks": 3' in (checkpoints / f"step-{STEPS:06d}" / "progress.json").read_text()
