"""The text-conditioned targets of the packaged teacher point to the finding that is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools.benchmarks import text_attention

RESULTS = Path(text_attention.__file__).parent / "results" / "text_attention.json"


@pytest.fixture(scope="module")
def measured():
    return text_attention.measure(100, 5)  # other films than the published ones


def test_the_asked_finding_stands_out_where_the_class_token_is_a_coin(measured):
    """About 90 of these films' findings have others beside them: a standard error of 0.05 at 0.5 and 0.03 at 0.9."""
    own = {name: values["own_over_others"]["mean"] for name, values in measured.items()}
    assert 80 < measured["class token"]["own_over_others"]["count"] < 140
    assert own["text-conditioned"] > 0.78 and own["text-conditioned, minus absent prompts"] > 0.7
    assert abs(own["class token"] - 0.5) < 0.1
    assert own["class token"] < own["half class token, half text-conditioned"] < own["text-conditioned"]
    assert own["text-conditioned, asked for another finding"] < 0.4


def test_only_targets_with_text_change_with_the_question(measured):
    change = {name: values["change"]["mean"] for name, values in measured.items()}
    assert change["class token"] == 0 and change["text-conditioned"] > 0.9
    assert 0.4 < change["half class token, half text-conditioned"] < 0.5


def test_the_measures_of_a_known_map(measured):
    from medalign.phantom import KINDS, stream, study
    from medalign.teacher.loading import load_teacher

    teacher = load_teacher(text_attention.FOLDER)
    item = next(item for item in (study(stream(0, "test"), i) for i in range(50)) if len(item.findings) > 1)
    flat = np.full(teacher.grid.size, 1 / teacher.grid.size)
    rows = text_attention.measure_film(item, dict.fromkeys(KINDS, flat), teacher)
    assert len(rows) == len(item.findings) and all(row["change"] == 0 for row in rows)
    assert all(row["own_over_others"] == 0 for row in rows)  # equal densities are not higher


def test_the_published_figures_are_complete():
    published = json.loads(RESULTS.read_text())
    assert set(published["targets"]) == {*text_attention.TARGETS, "text-conditioned, asked for another finding"}
    for values in published["targets"].values():
        for measure in text_attention.MEASURES:
            low, high = values[measure]["interval"]
            assert low <= values[measure]["mean"] <= high
    reports = {name: values["pointing"]["mean"] for name, values in published["reports"].items()}
    assert reports["class token"] > reports["text-conditioned, minus absent prompts"] > reports["text-conditioned"]


def test_the_target_of_a_report_follows_the_report():
    """About 75 of 100 films have findings: a standard error of 0.06 of each share of peaks."""
    measured = text_attention.measure_all_reports(100, 5)
    peaks = {name: values["pointing"]["mean"] for name, values in measured.items()}
    assert peaks["text-conditioned"] > peaks["text-conditioned, report of another film"] + 0.1
    assert peaks["class token"] > peaks["text-conditioned"]
