"""Scores of the findings of reports, counted by hand."""

from __future__ import annotations

import pytest

from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.findings import findings_scores
from medalign.evaluation.metrics.intervals import ratio


def report(reference: str, prediction: str, key: str = "k") -> Prediction:
    return Prediction(key, "report", "Describe.", reference, "", prediction)


ROWS = [
    report("Small left effusion. No pneumothorax.", "Right pleural effusion. Left pneumothorax."),  # side, contradicted
    report("Nodule in the right upper lobe.", "Nodule in the right lower lobe and cardiomegaly."),  # zone, hallucinated
    report("Possible pneumonia. Cardiomegaly.", "Pneumonia."),  # doubted, missed
    report("The lungs are clear.", "No acute abnormality."),
    report("Bilateral effusions.", "Left effusion."),  # incomplete, but no wrong side
    report("Effusion.", ""),
    report("Sin hallazgos.", "Normal."),
]


def test_counts_by_hand():
    found = findings_scores(ROWS)
    counts = {name: value for name, value in found.items() if name.endswith("_n")}
    assert counts == {
        "findings_report_n": 7,
        "findings_reference_n": 6,
        "findings_macro_n": 3,  # effusion, nodule, cardiomegaly
        "findings_chexpert14_macro_n": 4,  # and No Finding
        "findings_chexpert5_macro_n": 2,
        "findings_asserted_n": 5,
        "findings_hallucinated_n": 2,
        "findings_contradicted_n": 1,
        "findings_stated_n": 5,
        "findings_missed_n": 2,
        "findings_sided_n": 3,
        "findings_wrong_side_n": 1,
        "findings_zoned_n": 1,
        "findings_wrong_zone_n": 1,
        "findings_hallucinating_n": 2,
    }
    rates = {name: value for name, value in found.items() if "_of_" in name and not name.endswith(("_low", "_high"))}
    assert rates == pytest.approx(
        {
            "findings_hallucinated_of_asserted": 2 / 5,
            "findings_contradicted_of_asserted": 1 / 5,
            "findings_missed_of_stated": 2 / 5,
            "findings_wrong_side_of_sided": 1 / 3,
            "findings_wrong_zone_of_zoned": 1.0,
            "findings_hallucinating_of_reports": 2 / 7,
        }
    )
    assert found["findings_f1_micro"] == pytest.approx(6 / 10)
    # Effusion 4 / 5, nodule 1, cardiomegaly 0.
    assert found["findings_f1_macro"] == pytest.approx((4 / 5 + 1 + 0) / 3)
    # No Finding: one of one reference, and not for "Sin hallazgos."; the prediction "Normal." says nothing of a chest.
    assert found["findings_chexpert14_f1_micro"] == pytest.approx(2 * 4 / (5 + 1 + 5 + 1))
    assert found["findings_by"]["pleural effusion"] == {"stated_n": 3, "asserted_n": 2, "both_n": 2}


def test_a_repetition_of_the_reference_is_perfect():
    rows = [report(row.answer, row.answer) for row in ROWS[:6]]
    found = findings_scores(rows)
    for name in ("findings", "findings_chexpert14", "findings_chexpert5"):
        assert found[f"{name}_f1_micro"] == found[f"{name}_f1_macro"] == 1
    assert found["findings_hallucinated_n"] == found["findings_missed_n"] == found["findings_wrong_side_n"] == 0


def test_without_a_case_there_is_no_rate():
    assert findings_scores([]) == {}
    found = findings_scores([report("Clear lungs.", "")])
    assert found["findings_asserted_n"] == found["findings_stated_n"] == 0
    names = {"findings_hallucinated_of_asserted", "findings_missed_of_stated", "findings_f1_micro", "findings_f1_macro"}
    assert not names & set(found)
    assert found["findings_hallucinating_of_reports"] == 0 and found["findings_chexpert14_f1_micro"] == 0


def test_the_scores_of_reports_contain_them():
    assert score(ROWS).items() >= findings_scores(ROWS).items()
    assert not any(name.startswith("findings") for name in score([Prediction("k", "vqa", "q?", "no", "closed", "no")]))


def test_false_yes_counts_answers_to_questions_whose_reference_is_no():
    pairs = [("no", "Yes."), ("no", "no"), ("no", "unclear"), ("yes", "yes"), ("yes", "no"), ("left", "yes")]
    rows = [Prediction(str(i), "vqa", "q?", *pair[:1], "closed", pair[1]) for i, pair in enumerate(pairs)]
    found = score(rows)
    assert (found["false_yes_n"], found["false_yes_of_no"]) == (3, pytest.approx(1 / 3))
    assert score(rows[3:])["false_yes_n"] == 0 and "false_yes_of_no" not in score(rows[3:])


def test_a_ratio_resamples_units_and_not_cases():
    wide = ratio("x", [(10, 10), (0, 10)] * 10)
    narrow = ratio("x", [(1, 1), (0, 1)] * 100)
    assert wide["x"] == narrow["x"] == 0.5
    assert wide["x_high"] - wide["x_low"] == pytest.approx(10**0.5 * (narrow["x_high"] - narrow["x_low"]), rel=0.15)
    assert ratio("x", []) == ratio("x", [(0, 0)]) == {}
    assert ratio("x", [(0, 0)] * 50 + [(1, 2)])["x_low"] == 0.5  # resamples without a case are left out
