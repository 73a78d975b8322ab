"""Runs with other teachers, and with attention targets that follow the question."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import medalign
from medalign.cli.main import main
from medalign.observability.rows import read_rows
from tests.e2e.conftest import train
from tests.unit.teacher.towers.cases import CASES
from tests.unit.teacher.towers.test_texts import write_tokenizer

PHANTOM = Path(medalign.__file__).parent / "assets" / "phantom_teacher"


def first_losses(recipe: Path, folder: Path, *overrides: str, world: int = 1) -> dict[str, float]:
    train(recipe, folder, "--train.steps", "2", *overrides, world=world)
    return read_rows(folder / "metrics.jsonl")[0]


@pytest.mark.parametrize(("kind", "weight"), [("transformers SigLIP (MedSigLIP)", "0.5"), ("DINOv2", "0")])
def test_two_ranks_train_with_a_teacher_of_transformers(recipe, tmp_path, kind, weight):
    next(case for case in CASES if kind in case.name).write(tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher")
    words = ["--teacher.path", str(tmp_path / "teacher"), "--teacher.text_weight", weight]
    row = first_losses(recipe, tmp_path / "run", *words, world=2)
    assert all(math.isfinite(row[f"loss/{name}"]) and row[f"loss/{name}"] > 0 for name in ("attention", "similarity"))


def test_only_the_attention_loss_follows_the_question_and_no_cut_into_ranks_changes_it(recipe, tmp_path):
    words = ["--teacher.path", str(PHANTOM)]
    plain = first_losses(recipe, tmp_path / "plain", *words)
    text = first_losses(recipe, tmp_path / "text", *words, "--teacher.text_weight", "1")
    ranks = first_losses(recipe, tmp_path / "ranks", *words, "--teacher.text_weight", "1", world=2)
    for name in ("language", "similarity"):
        assert text[f"loss/{name}"] == plain[f"loss/{name}"]
    assert abs(text["loss/attention"] - plain["loss/attention"]) > 0.1
    # The sums of two ranks are added in another order: some roundings of float32.
    assert ranks["loss/attention"] == pytest.approx(text["loss/attention"], rel=1e-5)


@pytest.mark.parametrize("command", ["inspect", "train"])
def test_a_teacher_without_attention_is_refused_before_the_student_is_read(recipe, tmp_path, capsys, command):
    words = [command, str(recipe), "--run.dir", str(tmp_path / "run"), "--teacher.path", f"biovil:{tmp_path / 'x.pt'}"]
    assert main([*words, "--losses.beta", "0.06"]) == 2
    assert "losses.beta is 0.06, but teacher biovil:" in capsys.readouterr().err


def test_two_ranks_train_with_a_cached_teacher_and_the_same_one_running(recipe, tmp_path):
    """Each has its own losses; they differ by the rounding of features to float16 (see `test_target_cache`)."""
    words = ["--teacher.path", str(PHANTOM), "--teacher.cache", str(tmp_path / "cache")]
    words += [
        "--teacher.also",
        f"[{{path: {PHANTOM}, name: online, text_weight: 0.5}}]",
        "--teacher.text_weight",
        "0.5",
    ]
    assert main(["targets", str(recipe), *words]) == 0
    row = first_losses(recipe, tmp_path / "run", *words, world=2)
    loss, cosine = row["loss/similarity_online"], 2**-10
    assert 0 < abs(row["loss/similarity"] - loss) <= 2 * cosine * loss**0.5 + cosine**2
    assert row["loss/attention"] == pytest.approx(row["loss/attention_online"], rel=1e-5)
