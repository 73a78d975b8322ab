"""A step with the study's own loss terms."""

from __future__ import annotations

from medalign.observability.rows import read_rows
from tests.e2e.conftest import train


def test_a_step_with_true_boxes_and_shuffled_patches(recipe, tmp_path):
    terms = ("box_attention", "shuffled_similarity", "shuffled_attention")
    extra = ",".join(f"tools.study.terms.{name}" for name in terms)
    words = [f"--losses.extra=[{extra}]", "--losses.alpha=0", "--losses.beta=0", "--train.steps=1"]
    train(recipe, tmp_path / "run", *words)
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row[f"loss/{name}"] > 0 for name in terms)
    assert row["loss/shuffled_attention"] != row["loss/attention"]
    distilled = sum(row[f"loss/{name}"] for name in terms)
    assert abs(row["loss/total"] - row["loss/language"] - distilled) < 1e-5  # float32 sums of about 10
