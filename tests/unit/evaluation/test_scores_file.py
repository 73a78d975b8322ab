"""Scores of predictions on disk: of an evaluation, and of other systems."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medalign.__main__ import main
from medalign.evaluation.metrics import Prediction, read_predictions, score, write_predictions
from medalign.evaluation.scores_file import format_scores, rescore

ROWS = [
    Prediction("a", "vqa", "Is there?", "yes", "closed", "Yes.", "stop", attention_inside=0.1 + 0.2, box_area=1 / 3),
    Prediction("b", "vqa", "Where?", "left lower lobe", "open", "left", "length", truncated=True),
    Prediction("c", "vqa", "Where?", "left", "open", "", "stop", empty=True),
    Prediction("d", "report", "Describe.", "No effusion is seen today.", "", "No effusion is seen.", "stop"),
]
FACTS = {
    "name": "val",
    "data": ["/data/val"],
    "grid": [8, 8],
    "samples": 5,
    "limit": None,
    "max_length": 220,
    "max_new_tokens": 8,
    "unreadable": 1,
    "truncated": 1,
}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


MINIMAL = {"key": "a", "task": "vqa", "question": "Is there?", "answer": "yes", "prediction": "Yes."}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "evaluation" / "val"
    write_predictions(folder / "predictions.jsonl", ROWS)
    (folder / "scores.json").write_text(format_scores(ROWS, FACTS))
    return folder


def test_scores_of_predictions_equal_those_of_the_evaluation_bit_by_bit(evaluation, capsys):
    before = (evaluation / "scores.json").read_bytes()
    for _ in range(2):
        assert main(["score", str(evaluation / "predictions.jsonl")]) == 0
        assert (evaluation / "scores.json").read_bytes() == before
    assert main(["score", str(evaluation)]) == 0 and (evaluation / "scores.json").read_bytes() == before
    assert "1 of 5 samples could not be read" in capsys.readouterr().out


def test_scores_of_the_past_are_replaced_and_facts_are_kept(evaluation):
    path = evaluation / "scores.json"
    whole = path.read_bytes()
    path.write_text(json.dumps(FACTS | {"closed_accuracy": 0.0, "an_old_score": 1}))
    assert main(["score", str(evaluation)]) == 0 and path.read_bytes() == whole


def test_predictions_of_another_system_need_five_fields(tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    report = MINIMAL | {"key": "b", "task": "report", "answer": "Clear lungs.", "prediction": "  ", "model": "theirs"}
    path.write_text(lines(MINIMAL, report))
    assert main(["score", str(path)]) == 0
    shown = capsys.readouterr()
    assert "100.0" in shown.out and "1 of 2 answers are empty" in shown.out
    assert str(tmp_path / "other.scores.json") in shown.err
    scores = json.loads((tmp_path / "other.scores.json").read_text())
    assert scores["closed_accuracy"] == 1 and scores["rouge_l"] == 0 and scores["answers_empty"] == 1
    assert scores.items() >= score(read_predictions(path)).items()


def test_several_files_are_rows_of_one_table(evaluation, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(lines(MINIMAL))
    assert main(["score", str(evaluation), str(tmp_path / "other.jsonl"), str(evaluation)]) == 0
    table = capsys.readouterr().out.splitlines()
    expected = [evaluation / "scores.json", tmp_path / "other.scores.json"]
    assert [line.split()[0] for line in table[2:4]] == [str(path) for path in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not a prediction"),
        ("\n[1]", "line 2 is a JSON list, not an object"),
        (lines({**MINIMAL, "prediction": None}), "line 1: prediction is null; it must be str"),
        (lines({name: MINIMAL[name] for name in MINIMAL if name != "answer"}), "line 1 has no 'answer'"),
        (lines({**MINIMAL, "attention_inside": "0.5"}), "attention_inside is a str; it must be float | None"),
        (lines(MINIMAL).replace('"yes"', "NaN"), "NaN is not a number of JSON"),
        (lines({**MINIMAL, "boxes": [[1, 2, 3]]}), "boxes is a list; it must be list[list[float]]"),
        (lines({**MINIMAL, "task": "caption"}), "task must be vqa or report"),
        (lines(MINIMAL, MINIMAL), "contains the key 'a' 2 times"),
        ("[" * 100_000, "line 1 is not a prediction"),
        ("", "contains no prediction"),
        ("\n", "contains no prediction"),
        ("\udcff", "is not text in UTF-8"),
    ],
)
def test_what_is_not_a_prediction_is_refused_by_name(text, message, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["score", str(path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert [file.name for file in tmp_path.iterdir()] == ["other.jsonl"]


def test_a_file_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert main(["score", str(tmp_path)]) == 2
    assert f"{tmp_path / 'predictions.jsonl'} does not exist" in capsys.readouterr().err


def test_a_probe_whose_file_is_lost_keeps_its_scores_and_is_named(tmp_path, capsys):
    write_predictions(tmp_path / "predictions.jsonl", [Prediction("a", "vqa", "?", "yes", "closed", "yes")])
    (tmp_path / "scores.json").write_text(json.dumps({"probes": {"blank": {"n": 1, "accuracy": 1.0}}}))
    assert main(["score", str(tmp_path)]) == 2
    assert "probe-blank.jsonl does not exist, but" in capsys.readouterr().err
    assert json.loads((tmp_path / "scores.json").read_text())["probes"]["blank"]["n"] == 1


def test_answers_to_presupposing_questions_are_not_scored_against_their_references(tmp_path, capsys):
    path = tmp_path / "probe-presupposed.jsonl"
    write_predictions(path, [Prediction("a", "vqa", "Which side is it on?", "none", "open", "There is none.")])
    for words in (["score", str(path)], ["compare", f"a={path}", f"b={path}"]):
        assert main(words) == 2
        assert "its references are not answers" in capsys.readouterr().err


def test_further_scores_stay_with_the_predictions_that_they_were_computed_on(evaluation):
    path, (name, before, after) = evaluation / "scores.json", ("further", "bertscore_f1", "not_available")
    found = [{"bertscore_f1": 0.5}, {"not_available": {"bertscore_f1": "no package"}}, {"other": 1.0}]

    def scored() -> dict:
        return json.loads(path.read_text())

    for scores in found:
        rescore(evaluation, [lambda predictions, references, scores=scores: scores])
        rescore(evaluation)
        assert name in scored()
        assert (before in scored()) == (scores is found[0]) and (after in scored()) == (scores is not found[0])
    assert scored()["other"] == 1.0 and scored()[after] == {"bertscore_f1": "no package"}
    rows = [replace(row, prediction=f"{row.prediction} Clear.") for row in ROWS]
    write_predictions(evaluation / "predictions.jsonl", rows)
    rescore(evaluation)
    assert not {name, "other", after} & scored().keys()


@pytest.mark.parametrize("text", ['{"probes": 3}', '{"further": []}', "[]", "{"])
def test_damaged_scores_are_an_error(text, evaluation, capsys):
    (evaluation / "scores.json").write_text(text)
    assert main(["score", str(evaluation)]) == 2
    assert "evaluate the run again" in capsys.readouterr().err
