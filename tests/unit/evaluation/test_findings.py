"""The labeler of findings: on labeled sentences, on phantom reports, and on real notes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medalign.evaluation.findings import chest_labeler
from medalign.evaluation.findings.lexicon import NO_FINDING
from medalign.phantom import KINDS
from tools.benchmarks.findings import __main__ as benchmark

LABELER = chest_labeler()
RESULTS = json.loads((Path(benchmark.__file__).parents[1] / "results" / "findings.json").read_text())
SENTENCES = benchmark._rows(benchmark.HERE / "sentences.jsonl")
CHEXPERT = {
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
}


def test_the_lexicon_has_chexpert_s_observations_and_the_phantoms_findings():
    assert set(LABELER.lexicon.categories) == CHEXPERT
    for kind in KINDS:
        (name,) = LABELER.label(f"There is {kind}.")
        assert kind in name
    for entry in LABELER.lexicon.findings.values():
        assert set(LABELER.label(f"There is {entry.noun}")) == {entry.name} == set(LABELER.label(entry.asked[:-1]))
    for _, denied in LABELER.lexicon.normal:
        assert set(denied) <= LABELER.lexicon.findings.keys()


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in SENTENCES} - {"hard"}))
def test_sentences_of_a_kind(kind):
    rows = [row for row in SENTENCES if row["kind"] == kind]
    assert len(rows) >= 7
    for row in rows:
        found = {
            name: (label.assertion, label.sides, label.zones) for name, label in LABELER.label(row["text"]).items()
        }
        expected = benchmark.truth_of(row, LABELER)
        assert {name: value[0] for name, value in found.items()} == {
            name: value[0] for name, value in expected.items()
        }, row
        for name, value in expected.items():
            if value[0] == "present":
                assert found[name] == value, row


def test_the_measured_figures_are_those_of_the_file():
    cases = list(benchmark.read_sentences(LABELER))
    assert without_time(benchmark.measure(LABELER, cases)) == without_time(RESULTS["sentences"])
    assert RESULTS["signature"] == LABELER.signature, "run the command of docs/evaluation.md again"
    reports = list(benchmark.phantom_reports(100))
    found = benchmark.measure(LABELER, reports)
    assert found["present"]["precision"] == found["present"]["recall"] == found["sides_right"] == 1
    assert found["present"]["true"] > 100


def test_the_figures_of_real_notes_are_those_of_the_file(shared):
    notes = benchmark.read_notes(LABELER, shared / "data" / "covid_chestxray" / "annotations.jsonl")
    assert without_time(benchmark.measure(LABELER, notes)) == without_time(RESULTS["notes"])


def without_time(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if name != "milliseconds_per_text"}


def test_one_mention_as_present_counts_before_doubt_and_denial():
    text = "Possible effusion. No effusion on the right. Small left effusion."
    label = LABELER.label(text)["pleural effusion"]
    assert (label.assertion, label.sides) == ("present", {"left"})
    assert LABELER.label("No effusion. Possible effusion.")["pleural effusion"].assertion == "uncertain"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("", False),
        ("Thank you.", False),
        ("The lungs are clear.", True),
        ("No acute cardiopulmonary process.", True),
        ("No pneumothorax.", True),
        ("No pneumothorax. Left effusion.", False),
        ("No pneumothorax. Possible effusion.", False),
        ("Clear lungs. Endotracheal tube in place.", True),
    ],
)
def test_no_finding_needs_a_statement(text, finding):
    assert (LABELER.categories(LABELER.read(text)).get(NO_FINDING) == "present") is finding


def test_a_nodule_is_a_lung_lesion_of_chexpert():
    reading = LABELER.read("Nodule in the left apex. No mass.")
    assert LABELER.categories(reading) == {"Lung Lesion": "present"}


def test_words_that_deny():
    assert LABELER.denies_something("not seen") and LABELER.denies_something("There is none.")
    assert not LABELER.denies_something("left upper zone") and not LABELER.denies_something("no change")


@pytest.mark.parametrize("text", ["." * 500, "no " * 2000, "(((((" * 100, "\x00effusion", "no, " * 500 + "effusion"])
def test_odd_text_is_read_in_a_short_time(text):
    LABELER.read(text)
