"""The registered analysis on constructed results, and the page that is written from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from medalign.errors import DataError
from tools.study import report
from tools.study.analysis import CONTRASTS, check, complete, contrasts
from tools.study.arms import ARMS, FIRST_SEED
from tools.study.results_file import PRIMARY, read_results
from tools.study.runner import RESULTS

EFFECTS = {"V": 0.01, "A": 0.03, "B": 0.04, "U": 0.0, "T": 0.05, "X": 0.06, "S": 0.0, "L": 0.0}
NAMES = (PRIMARY, *report.SECONDARY, *report.CONDITIONAL)


def result(arm: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    found = {
        "arm": arm,
        "seed": seed,
        "trial": False,
        "films": 2000,
        "commit": "abc",
        "questions": 100,
        "keys": "k",
        "student": "s",
        "teacher": "t",
        "settings": arm,
        "weights": {"adapter": f"{arm}{seed}{more}"},
        "versions": {"medalign": "1"},
        "diverged_steps": 0,
        "scores": dict.fromkeys(NAMES, score),
    }
    return found | more


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    """All runs of the full size: an effect per arm, on top of seeds that differ by far more."""
    level, noise = np.random.default_rng(0), np.random.default_rng(1)
    levels = level.normal(0.8, 0.1, 8)
    return {
        f"{arm}-{FIRST_SEED + place}": result(
            arm, FIRST_SEED + place, levels[place] + EFFECTS[arm] + noise.normal(0, 0.005)
        )
        for arm, facts in ARMS.items()
        for place in range(facts.seeds)
    }


def test_a_contrast_is_a_paired_t_test_over_seeds(results):
    found = contrasts(results)["B - L"]
    both, language = ([results[f"{arm}-{FIRST_SEED + place}"]["scores"][PRIMARY] for place in range(8)] for arm in "BL")
    test = stats.ttest_rel(both, language)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.mean == pytest.approx(np.mean(both) - np.mean(language)) and found.p_sign_flip == 2 / 2**8


def test_main_effects_are_those_of_the_factorial(results):
    found = contrasts(results)
    assert found["main effect of L_vis"].mean == pytest.approx(0.01, abs=0.006)
    assert found["main effect of L_att"].mean == pytest.approx(0.03, abs=0.006)
    assert len(found["main effect of L_att"].values) == 5 and len(found["T - B"].values) == 8
    assert found["X - B"].mean == pytest.approx(0.02, abs=0.008)


def test_holm_is_for_six_contrasts_also_if_some_are_missing(results):
    whole = contrasts(results)
    assert {name for name, one in whole.items() if one is not None} == set(CONTRASTS)
    del results["U-17"], results["X-10"]
    found = contrasts(results)
    assert found["B - U"] is None and found["X - B"] is None
    smallest = min((one for one in found.values() if one is not None), key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(6 * smallest.p)
    assert not complete(results, "U") and complete(results, "B")


def test_an_incomplete_arm_shows_no_number(results):
    results["L-17"]["scores"] = dict.fromkeys(NAMES, 0.123456)
    assert "| L | language loss | 8 of 8 |" in report.tables(results)
    del results["L-10"]
    text = report.tables(results)
    assert "| L | language loss | 7 of 8 | not yet run |" in text
    assert "| B - L | not yet run |" in text and "12.3" not in text
    assert "| main effect of L_vis | not yet run |" in text
    assert "| T - B | not yet run |" not in text  # which does not need L


def test_smaller_sets_and_trials_are_apart(results):
    for arm in "LB":
        for seed in (10, 11, 12):
            results[f"{arm}-250-{seed}"] = result(arm, seed, 0.31, films=250)
        results[f"trial-{arm}-0.003"] = result(arm, 9, 0.411, trial=True, keys="d", questions=50)
    before = contrasts(results)
    text = report.tables(results)
    assert "| 250 | 31.0 ± 0.0 | 31.0 ± 0.0 |" in text and "| 1,000 | not yet run | not yet run |" in text
    assert "| L | 41.1 | not yet run |" in text
    for name in [name for name in results if "250" in name or "trial" in name]:
        del results[name]
    assert contrasts(results) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": "others"}, "keys differs: L-10 has k and B-10 has others"),
        ({"student": "another"}, "student differs"),
        ({"teacher": "another"}, "teacher differs"),
        ({"settings": "another"}, "settings differs: B-2000-10 has another and B-2000-11 has B"),
        ({"weights": {"adapter": "B11{}"}}, "B-11 and B-10 have the same weights"),
    ],
)
def test_runs_that_are_not_comparable_are_refused(results, change, message):
    results["B-10"] |= change
    with pytest.raises(DataError, match=message):
        check(results)


def test_the_page_holds_the_tables_of_the_result_files():
    """`python -m tools.study report` writes it."""
    assert report.tables(read_results(RESULTS)) in report.PAGE.read_text(encoding="utf-8")


def test_the_tables_replace_the_old_ones(results, tmp_path: Path):
    page = tmp_path / "study.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_page(results, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("### Contrasts") == 1
    page.write_text("no place")
    with pytest.raises(DataError, match="does not contain"):
        report.write_page(results, page)
