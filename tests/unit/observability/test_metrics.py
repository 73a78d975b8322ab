"""The list of metrics; tests/e2e compares it with the rows of a run."""

from __future__ import annotations

import pytest

from medalign.observability.metrics import METRICS, find_metric


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("loss/total", "loss/total"),
        ("loss/my_term", "loss/{term}"),
        ("optim/lr", "optim/lr"),
        ("optim/lr_projector", "optim/lr_{group}"),
        ("data/source_12_samples", "data/source_{number}_samples"),
        ("validation/loss/total", "validation/loss/{term}"),
    ],
)
def test_a_metric_is_found_by_its_name(name, metric):
    assert find_metric(name).name == metric


@pytest.mark.parametrize("name", ["loss", "loss/a/b", "memory/peak_gib", "optim/lrs"])
def test_other_names_are_no_metrics(name):
    assert find_metric(name) is None


def test_names_are_unique():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
