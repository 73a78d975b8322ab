"""Rules of published evaluations, on answers where they differ."""

from __future__ import annotations

import pytest

from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.answers import closed_correct
from medalign.evaluation.metrics.rules import (
    chosen,
    chosen_by_letter,
    chosen_by_text,
    official_correct,
    pope_answer,
    reference_choice,
    token_f1,
)

OPTIONS = ("Lung", "Left lung", "Pneumonia", "A nodule")


def vqa(answer: str, prediction: str, kind: str = "closed", **fields) -> Prediction:
    return Prediction("k", "vqa", "question?", answer, kind, prediction, "stop", not prediction, **fields)


@pytest.mark.parametrize(
    ("prediction", "reference", "ours", "official", "pope"),
    [
        ("Yes.", "yes", True, True, True),
        ("no", "no", True, True, True),
        ("The heart is normal.", "no", False, True, False),  # "normal" contains "no"
        ("I cannot tell.", "no", False, True, False),
        ("Unknown", "no", False, True, False),
        ("Left", "left", True, False, None),  # contains neither yes nor no
        ("Left, no doubt", "left", False, True, None),
        ("No, yes", "yes", False, True, False),
        ("It is not seen.", "no", False, True, True),  # "not" contains "no", but no word is "no"
        ("Absent.", "no", False, False, False),  # POPE takes as yes what is not no
        ("Absent.", "yes", False, False, True),
        ("It is seen. No doubt.", "yes", False, False, True),  # POPE reads the first sentence only
        ("NO", "no", True, True, False),  # POPE knows "No" and "no"
        ("", "no", False, False, False),
        ("", "yes", False, False, True),
        ("", "+", False, False, None),  # a reference without words
        ("yes", "+", False, False, None),
        ("+", "+", True, False, None),
    ],
)
def test_the_rules_differ(prediction, reference, ours, official, pope):
    assert closed_correct(prediction, reference) is ours
    assert official_correct(prediction, reference) is official
    if pope is not None:
        assert (pope_answer(prediction) == reference) is pope


@pytest.mark.parametrize(
    ("prediction", "letter", "text"),
    [
        ("B", 1, None),
        ("(B)", 1, None),
        ("B. Left lung", 1, 1),
        ("B) Pneumonia", 1, 2),
        ("The answer is C", 2, None),
        ("Answer: (D)", 3, None),
        ("Answer: A nodule", None, 3),
        ("Option C, pneumonia", 2, 2),
        ("the left lung", None, 1),  # "lung" occurs only within "left lung"
        ("lung", None, 0),
        ("pneumonia of the left lung", None, None),  # two options
        ("A nodule is seen", None, 3),  # an article, not a letter
        ("nodules", None, None),
        ("E", None, None),  # there is no fifth option
        ("b", None, None),
        ("", None, None),
    ],
)
def test_choices_by_letter_and_by_text(prediction, letter, text):
    assert chosen_by_letter(prediction, OPTIONS) == letter
    assert chosen_by_text(prediction, OPTIONS) == text


def test_an_option_that_is_repeated_comes_before_a_letter():
    bacteria = ("E. coli", "C. difficile", "H. pylori", "S. aureus")
    assert chosen_by_letter("C. difficile", bacteria) == 2 and chosen("C. difficile.", bacteria) == 1
    assert [chosen(text, bacteria) for text in ("C", "it is E. coli", "none")] == [2, 0, None]


def test_the_reference_of_a_choice_is_its_text_or_its_letter():
    answers = ("left lung.", "C", "the nodule", "heart")
    assert [reference_choice(answer, OPTIONS) for answer in answers] == [1, 2, 3, None]
    assert reference_choice("A", ("B", "A")) == 1  # the text first


def test_token_f1_by_hand():
    """Two of three words of each are shared; repeated words count as often as they occur in both."""
    assert token_f1("left upper lobe", "left lower lobe") == pytest.approx(2 / 3)
    assert token_f1("lobe lobe lobe lobe", "left lobe") == pytest.approx(2 * 1 / (4 + 2))
    assert (token_f1("", "left"), token_f1("?", "!"), token_f1("?", "?"), token_f1("the left", "left")) == (0, 0, 1, 1)


def test_scores_of_the_rules():
    rows = [
        vqa("yes", "Yes"),
        vqa("no", "It is normal"),
        vqa("no", "yes"),
        vqa("yes", "", finding="nodule"),
        vqa("left lung", "B", options=list(OPTIONS), finding="nodule"),
        vqa("left lung", "lung", "open", options=list(OPTIONS), question_type="where"),
        vqa("heart", "lungs", "open", options=list(OPTIONS)),  # its reference is none of the options
    ]
    found = score(rows)
    assert found["closed_accuracy"] == pytest.approx(1 / 5) and found["closed_official"] == pytest.approx(2 / 5)
    assert (found["yes_no_n"], found["yes_no_unparseable"]) == (4, 0.5)
    # POPE: yes, yes, yes, yes for yes, no, no, yes
    assert (found["pope_accuracy"], found["pope_yes"], found["pope_precision"]) == (0.5, 1.0, 0.5)
    assert (found["pope_recall"], found["pope_f1"]) == (1.0, pytest.approx(2 / 3))
    assert (found["choice_n"], found["choice_accuracy"], found["choice_letter"]) == (2, 0.5, 0.5)
    assert (found["choice_text"], found["choice_unparseable"]) == (0, 0)
    assert found["open_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert (found["answers_empty_share"], found["answers_cut_share"]) == (pytest.approx(1 / 7), 0)
    assert list(found["by"]) == ["question_type", "finding"]
    assert found["by"]["finding"]["nodule"]["closed_accuracy"] == 0 and found["by"]["finding"][""]["n"] == 5
    assert found["by"]["question_type"]["where"]["open_recall"] == 0.5


def test_scores_without_a_case_are_omitted():
    found = score([vqa("no", "No"), vqa("no", "no")])
    assert found["pope_accuracy"] == 1 and not {"pope_precision", "pope_recall", "pope_f1"} & set(found)
    assert not {"choice_n", "open_f1", "by"} & set(found)
    only_reports = score([Prediction("k", "report", "q", "a b", "", "a b")])
    assert not {"rules_signature", "closed_official", "answers_empty_share"} & set(only_reports)
    other = vqa("no", "no")
    other.finish_reason = ""
    assert "answers_cut_share" not in score([other])
