"""The rows of a run have the metrics that are documented."""

from __future__ import annotations

import pytest

from medalign.data.shards.index import ShardIndex
from medalign.observability.metrics import METRICS, find_metric
from medalign.observability.rows import read_rows

CONDITIONS = ("", "with a teacher", "if LoRA is trained", "if W is trained", "unless folders are mixed by weight")


def test_the_rows_of_a_run_have_the_documented_metrics(trained, shards):
    rows = read_rows(trained / "metrics.jsonl")
    names = [name for name in rows[-1] if name not in ("step", "time")]
    assert [name for name in names if find_metric(name) is None] == []
    wanted = {metric.name for metric in METRICS if metric.when in CONDITIONS}
    assert wanted <= set(names)
    assert {find_metric(name).name for name in names} - wanted == {"optim/lr_{group}"}
    assert len({frozenset(row) for row in rows}) == 1, "every row of a training step has the same metrics"


def test_the_values_of_the_rows_are_plausible(trained, shards):
    rows = read_rows(trained / "metrics.jsonl")
    for number, row in enumerate(rows, start=1):
        assert row["train/samples"] == 4 * number and row["job/world_size"] == 1
        assert row["train/epoch"] == pytest.approx(4 * number / len(ShardIndex.open(shards / "train")))
        assert 0 < row["speed/teacher_share"] < 1 and 0 < row["speed/tflops"] < 10
    norms = [row["optim/steering_norm"] for row in rows]
    assert norms[0] > 0 and norms[-1] > norms[0]
