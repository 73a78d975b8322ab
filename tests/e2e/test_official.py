"""The recipe `official/vqa_rad` as a run: one epoch with the query mixture, and an export that answers."""

from __future__ import annotations

import math
from pathlib import Path

from medalign.data.shards.index import ShardIndex
from medalign.inference import open_student
from medalign.observability.rows import read_rows
from tests.e2e.conftest import train


def test_an_epoch_of_the_official_recipe(shards, student_folder, teacher_folder, tmp_path):
    folder, samples = tmp_path / "official", len(ShardIndex.open(shards / "val"))
    words = ["--student.path", student_folder, "--teacher.path", teacher_folder, "--data.train", shards / "val"]
    words += ["--student.layer", "2", "--student.query_mixture", "true", "--train.epochs", "1"]
    words += ["--train.batch_size", "8", "--engine.deepspeed", "cpu", "--data.workers", "0", "--log.interval", "1"]
    (output,) = train(Path("official/vqa_rad"), folder, *map(str, words))
    steps = math.floor(samples / 8 + 0.5)
    assert f"{steps} steps of 8 samples" in output
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[-1]["loss/language"] < rows[0]["loss/language"]
    assert all(row["loss/attention"] != 0 != row["loss/similarity"] for row in rows)
    student, _, _ = open_student(folder)
    learned = [name for named in student.trainable().values() for name, _ in named]
    assert not any("layers.2.self_attn.q_proj" in name for name in learned)
    assert any("layers.1.self_attn.q_proj" in name for name in learned)
    assert student.mixture.up.abs().max() > 0
