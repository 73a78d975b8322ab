from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.errors import DataError
from medalign.evaluation.metrics import Prediction, read_predictions, score, write_predictions
from medalign.evaluation.metrics.answers import closed_correct, exact, open_recall, words
from medalign.evaluation.metrics.intervals import mean
from medalign.evaluation.metrics.reports import bleu, bleu_with_interval, rouge_l


def vqa(answer: str, prediction: str, answer_type: str = "closed", **fields) -> Prediction:
    return Prediction("k", "vqa", "question?", answer, answer_type, prediction, **fields)


def report(answer: str, prediction: str) -> Prediction:
    return Prediction("k", "report", "Describe.", answer, "", prediction)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left lung.", ["left", "lung"]),
        ("X-ray, AP view", ["x", "ray", "ap", "view"]),
        ("about 3.5 cm", ["about", "3.5", "cm"]),
        ("the patient\u2019s skin", ["patient's", "skin"]),
        ("A", ["a"]),
        ("snake_case", ["snake", "case"]),
        ("Pleuraerguß", ["pleuraerguß"]),
        ("?!", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("reference", "prediction", "right"),
    [
        ("Yes", "yes", True),
        ("No", "There is no effusion.", True),
        ("Yes", "No, yes", False),
        ("Yes, bilateral", "Yes.", True),
        ("No", "normal", False),  # "no" as a part of a word is not an answer
        ("No", "", False),
        ("Right side", "the right side!", True),
        ("Right side", "right", False),
        ("CT", "ct", True),
        ("B", "B.", True),
        ("是", "是的。", True),
        ("是的", "是", True),
        ("不是", "否", True),
        ("没有", "没有胸腔积液。", True),
        ("有", "没有", False),
        ("否", "无法判断", False),  # "cannot be judged" begins like "no"
        ("はい", "はい、あります。", True),
        ("はい、あります", "はい", True),
        ("いいえ", "ありません", True),
        ("いいえ", "はい", False),
        ("是", "yes", True),
        ("有效", "有", False),  # a choice that begins like "yes"
        ("右肺", "右肺。", True),
    ],
)
def test_closed_answers(reference, prediction, right):
    assert closed_correct(prediction, reference) is right


@pytest.mark.parametrize(
    ("reference", "prediction", "recall"),
    [
        ("left lower lobe", "In the lower lobe of the left lung.", 1.0),
        ("left lower lobe", "upper lobe", 1 / 3),
        ("lobe", "lobe lobe lobe", 1.0),
        ("left and left", "left", 2 / 3),  # counted as often as it occurs in the reference
        ("cardiomegaly", "", 0.0),
        ("?", "?", 1.0),  # without words, the texts must be equal
        ("?", "", 0.0),
        ("?", "something", 0.0),
    ],
)
def test_open_recall(reference, prediction, recall):
    assert open_recall(prediction, reference) == pytest.approx(recall)


@settings(deadline=None)
@given(st.text(), st.text())
def test_scores_are_bounded_and_the_reference_is_correct(a, b):
    assert 0.0 <= open_recall(a, b) <= 1.0
    assert open_recall(a, a) == 1.0 and exact(a, a) and closed_correct(a, a)
    assert exact(a, b) == exact(b, a)


def test_reports_by_hand():
    reference = "there is a small nodule in the left upper lobe"
    assert bleu([reference], [reference]) == pytest.approx(100.0)
    assert rouge_l(reference, reference) == pytest.approx(1.0)
    # longest common subsequence "a nodule in the lobe": 5 of 6 words of the prediction, 5 of 10 of the reference
    assert rouge_l("a big nodule in the lobe", reference) == pytest.approx(2 * (5 / 6) * 0.5 / (5 / 6 + 0.5))
    # BLEU-2-gram and above by hand: 4 words, matches 4/4, 3/3, 2/2, 1/1, brevity penalty exp(1 - 8/4)
    assert bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(100 * math.exp(-1))


@pytest.mark.parametrize("text", ["normal", "3.5 cm", "no acute disease", "\u6b63\u5e38", "normal\u0435"])
def test_a_short_corpus_that_equals_its_references_has_bleu_100(text):
    found = bleu_with_interval([text, text], [text, text], resamples=5)
    assert (found.points, found.low, found.high) == pytest.approx((100, 100, 100))
    if text.isascii():  # else standard BLEU stays
        for given in ("abnormal", f"{text} {text}", ""):
            assert bleu([given], [text]) == sacrebleu.corpus_bleu([given], [[text]]).score < 40


def test_bleu_has_an_interval():
    """The reference is sacrebleu's bootstrap with another seed: 1000 samples vary by a few percent of the width."""
    sentence = "no acute cardiopulmonary abnormality is seen in the left lower lobe of the lung"
    draw = np.random.default_rng(1)
    references = [" ".join(draw.permutation(sentence.split())) for _ in range(60)]
    predictions = [" ".join(text.split()[: draw.integers(4, 15)]) for text in references]
    found = bleu_with_interval(predictions, references)
    assert found == bleu_with_interval(predictions, references)
    assert found.points == sacrebleu.corpus_bleu(predictions, [references]).score
    expected = json.loads(
        sacrebleu.BLEU()
        .corpus_score(predictions, [references], n_bootstrap=1000)
        .format(signature="a:b", is_json=True, width=4)
    )
    # The 2.5 % quantile of 1000 normal draws has a standard error of sqrt(0.025 * 0.975 / 1000) / f = 0.085 sigma, with
    # the density f = 0.058 / sigma. Half the width (1.96 sigma) and the middle of one bootstrap therefore have 3 % of
    # half the width, and the differences of two bootstraps 4.3 %. The tolerance is 2.3 times that.
    width = expected["confidence_var"]
    assert (found.high - found.low) / 2 == pytest.approx(width, abs=0.1 * width)
    assert (found.high + found.low) / 2 == pytest.approx(expected["confidence_mean"], abs=0.1 * width)
    scores = score([report(*pair) for pair in zip(references, predictions, strict=True)])
    assert (scores["bleu"], scores["bleu_low"], scores["bleu_high"]) == found[:3]
    empty = bleu_with_interval(["", predictions[1]], references[:2])
    assert empty.points == sacrebleu.corpus_bleu(["", predictions[1]], [references[:2]]).score and empty.low == 0
    perfect = bleu_with_interval(references, references)
    assert perfect.low == perfect.high == perfect.points == pytest.approx(100)


def test_scores_count_each_group_and_omit_empty_ones():
    rows = [
        vqa("yes", "Yes."),
        vqa("no", "yes"),
        vqa("no", "no", ""),  # unknown type, yes or no: closed
        vqa(
            "left lung",
            "right lung",
            "open",
            attention_inside=0.4,
            box_area=0.1,
            pointing_hit=True,
            pointing_chance=0.2,
        ),
        vqa("left lung", "left lung", "", attention_inside=0.2, box_area=0.3, pointing_hit=False, pointing_chance=0.4),
        report("no finding", "no finding"),
    ]
    scores = score(rows)
    assert [scores[f"{g}n"] for g in ("", "closed_", "open_", "report_", "grounding_", "pointing_")] == [
        6,
        3,
        2,
        1,
        2,
        2,
    ]
    assert scores["closed_accuracy"] == pytest.approx(2 / 3)
    assert scores["closed_majority"] == pytest.approx(2 / 3)
    assert scores["open_recall"] == pytest.approx(0.75) and scores["open_exact"] == pytest.approx(0.5)
    assert scores["attention_inside"] == pytest.approx(0.3) and scores["box_area"] == pytest.approx(0.2)
    assert scores["pointing_hits"] == pytest.approx(0.5) and scores["pointing_chance"] == pytest.approx(0.3)
    assert scores["rouge_l"] == pytest.approx(1.0)
    assert set(score([]).values()) == {0}
    assert set(score([])) == {"n", "closed_n", "open_n", "report_n", "grounding_n", "pointing_n", "ungrounded"}


def test_a_box_outside_the_image_is_counted_and_changes_no_score():
    seen = vqa("yes", "yes", attention=[1.0], boxes=[[0, 0, 2, 2]], attention_inside=0.4, box_area=0.1)
    beside = vqa("yes", "yes", attention=[1.0], boxes=[[9, 9, 10, 10]])
    scores = score([seen, beside, vqa("yes", "yes")])
    assert (scores["ungrounded"], scores["grounding_n"], scores["attention_inside"]) == (1, 1, 0.4)


@pytest.mark.parametrize(("task", "kind"), [("caption", ""), ("vqa", "CLOSED")])
def test_an_unknown_task_or_answer_type_is_an_error(task, kind):
    with pytest.raises(DataError, match="'k7'"):
        score([Prediction("k7", task, "q", "a", kind, "a")])


def test_the_interval_contains_the_mean_and_is_reproducible():
    values = [True] * 70 + [False] * 30
    first = mean("x", values)
    assert first == mean("x", values)
    # The quantiles of the binomial distribution are 0.61 and 0.79. Means of 100 values have steps of 0.01, and 1000
    # draws place a quantile (standard error 0.004) within one step.
    assert first["x_low"] == pytest.approx(0.61, abs=0.0101) and first["x_high"] == pytest.approx(0.79, abs=0.0101)


def test_predictions_are_read_as_written(tmp_path):
    path = tmp_path / "evaluation" / "predictions.jsonl"
    rows = [
        vqa("ja\u2028nein", 'line\nbreak "quoted"'),
        vqa(
            "left",
            "left",
            "open",
            attention_inside=0.25,
            box_area=0.1,
            pointing_hit=True,
            pointing_chance=0.2,
            attention=[0.123456789, 1.0e-7],
            boxes=[[1.0, 2.0, 3.5, 4.0]],
            image_size=(640, 480),
        ),
    ]
    write_predictions(path, rows)
    rows[1].attention = [0.1235, 1.0e-7]
    assert read_predictions(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_predictions_are_whole_or_those_before(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [vqa("old", "old")])

    def rows():
        yield vqa("a", "b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, rows())
    assert [row.answer for row in read_predictions(path)] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_bad_predictions_are_an_error(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(DataError, match="'k'"):
        write_predictions(path, [vqa("a", "b", attention_inside=math.nan)])
    assert not list(tmp_path.iterdir())
    path.write_text('{"key": "a"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_predictions(path)
