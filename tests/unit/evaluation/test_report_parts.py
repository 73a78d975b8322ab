"""The parts of the report's page that are not HTML: arms, differences, headline, gallery, files, provenance."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medalign import phantom
from medalign.errors import DataError
from medalign.evaluation.comparison import Comparison
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.probes.catalog import PROBES
from medalign.evaluation.probes.scores import probe_scores
from medalign.evaluation.report.columns import PAGE_COLUMNS, QUESTIONS, Column
from medalign.evaluation.report.curves import panels
from medalign.evaluation.report.differences import Difference, Differences, find_differences
from medalign.evaluation.report.downloads import csv_uri, png_uri, table_figure
from medalign.evaluation.report.gallery import choose
from medalign.evaluation.report.headline import details, headline
from medalign.evaluation.report.origin import find_origin
from medalign.evaluation.report.runs import Arm, Evaluation, RunRecord, config_differences, evaluation_names, read_arms
from medalign.evaluation.report.score_files import score_download
from medalign.evaluation.report.tables import score_table
from medalign.evaluation.report.text_table import format_score_table
from tests.unit.evaluation.runs_on_disk import make_run

TAUGHT = {"alpha": 1.0, "beta": 0.06}
UNTAUGHT = {"alpha": 0.0, "beta": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of two systems, one of which answers much better."""
    folder = tmp_path_factory.mktemp("parts")
    phantom.write_phantoms(folder / "shards", 1, 12, 0)
    for name, skill, losses in (("low", 0.3, UNTAUGHT), ("high", 0.95, TAUGHT)):
        for seed in (3, 4):
            config = {"run": {"seed": seed}, "losses": losses, "teacher": {"path": "/models/clip"}}
            run = folder / f"{name}{seed}"
            make_run(run, folder / "shards" / "val", skill=skill, aim=0.5, steps=0, config=config, seed=seed)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    return read_arms([f"low={folder / 'low3'}", f"high={folder / 'high3'}"])


@pytest.fixture(scope="module")
def seeds(folder):
    return read_arms([f"{name}={folder / f'{name}3'},{folder / f'{name}4'}" for name in ("low", "high")])


def arm(title, rows):
    evaluation = Evaluation(Path(title), {"n": len(rows), "closed_n": 1, "open_n": 1})
    evaluation.__dict__["predictions"] = {row.key: row for row in rows}
    return Arm(title, (RunRecord(Path(title), title, {}, [], {"val": evaluation}),))


def decoded(uri):
    return base64.b64decode(uri.partition(",")[2])


def table_of(uri):
    return list(csv.reader(io.StringIO(decoded(uri).decode("utf-8-sig"))))


def test_several_seeds_are_one_row_with_their_spread(seeds):
    table = score_table(seeds, "val", (QUESTIONS,))
    assert [arm.title for arm, _ in table.rows] == ["low", "high"]
    assert [run.title for run in seeds[1].runs] == ["high, seed 3", "high, seed 4"]
    for arm_, (cell,) in table.rows:
        values = [100 * one.questions["questions_correct"] for one in arm_.evaluations("val")]
        assert cell.value == pytest.approx(sum(values) / 2) and cell.seeds == 2 and cell.low is None
        assert cell.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)  # of two values
    assert dict(config_differences(seeds)) == {"losses.alpha": ["0.0", "1.0"], "losses.beta": ["0.0", "0.06"]}
    assert re.search(r"\nhigh .* \*\d+\.\d \N{PLUS-MINUS SIGN}\d+\.\d", format_score_table(score_table(seeds, "val")))
    found = find_differences(seeds, "val")
    assert {one.comparison.unit for one in found.found.values()} == {"seed"} and "over 2 seeds" in found.method


def test_arms_with_other_numbers_of_seeds_are_not_compared(seeds, single):
    found = find_differences([seeds[0], single[1]], "val")
    (problem,) = found.problems
    assert not found.found and problem.startswith("high is not compared with low: arm high has 1 seeds and low has 2")


def test_differences_are_those_of_compare_and_hold_by_the_adjusted_p_value(single):
    found = find_differences(single, "val")
    better = found.of(single[1], "questions_correct")
    scores = [one.evaluations("val")[0].questions["questions_correct"] for one in single]
    assert better.value == pytest.approx(100 * (scores[1] - scores[0])) and better.holds
    assert found.of(single[0], "questions_correct") is None
    assert not replace(better, comparison=replace(better.comparison, p_holm=0.05)).holds
    assert "over 12 images, adjusted by Holm's method for the 8 tests" in found.method


def test_samples_without_a_cluster_are_not_compared_for_a_reason(single):
    rows = list(single[0].evaluations("val")[0].predictions.values())
    found = find_differences([arm("a", rows), arm("b", rows)], "val", "patient")
    assert not found.found and "do not name their patient" in found.problems[0]


def compared(arm, value, p_holm):
    numbers = {"samples": 9, "unit": "image", "units": 5, "baseline_score": 0.5, "arm_score": 0.5 + value}
    one = Comparison("questions_correct", "L", arm, **numbers, difference=value, low=-0.1, high=0.2, p=0.01)
    return Difference(replace(one, p_holm=p_holm))


@pytest.mark.parametrize(
    ("found", "title"),
    [
        ([("B", 0.052, 0.01)], "B is 5.2 points above L in the share of correct answers"),
        ([("B", -0.03, 0.01)], "B is 3.0 points below L in the share of correct answers"),
        ([("B", 0.052, 0.2)], "No difference between B and L holds in the share of correct answers"),
        (
            [("B", 0.05, 0.01), ("V", -0.02, 0.01), ("A", 0.1, 0.5)],
            "B is 5.0 points above L in the share of correct answers; V is 2.0 points below L in the share of correct "
            "answers; for 1 other arm no difference holds",
        ),
        (
            [("B", 0.05, 0.5), ("V", -0.02, 0.6)],
            "None of 2 arms differs from L in the share of correct answers beyond chance",
        ),
        ([], "The share of correct answers: L 50.0 %"),
    ],
)
def test_the_title_says_what_was_found(found, title):
    rows = [Prediction("a", "vqa", "?", "yes", "closed", "yes"), Prediction("b", "vqa", "?", "left", "open", "right")]
    table = score_table([arm(name, rows) for name in ("L", *(name for name, *_ in found))], "val", (QUESTIONS,))
    differences = Differences("L", {(name, "questions_correct"): compared(name, *rest) for name, *rest in found})
    assert headline(table, differences) == title
    assert details(table, differences).startswith("On val, the share of correct answers: L 50.0")


def asked(key, reference, said, **values):
    kind = "closed" if reference in ("yes", "no") else "open"
    return Prediction(key, "vqa", "?", reference, kind, said, attention=[1.0], image=f"film {key}", **values)


def test_the_gallery_has_as_many_questions_of_each_kind():
    rows = [asked(f"false-yes {i}", "no", "yes") for i in range(9)]
    rows += [asked(f"false-no {i}", "yes", "no") for i in range(5)]
    rows += [asked(f"wrong {i}", "left", "right") for i in range(3)] + [asked("wrong 3", "yes", "maybe")]
    rows += [asked(f"wrong-place {i}", "left", "left", pointing_hit=False) for i in range(2)]
    rows += [Prediction(f"report {i}", "report", "", "Clear.", "", "Clear.") for i in range(3)]
    rows += [asked("right 0", "no", "no")]
    right = [replace(row, prediction=row.answer, pointing_hit=None) for row in rows]
    choice = choose([arm("a", rows).evaluations("val")[0], arm("b", right).evaluations("val")[0]], 2)
    assert [item.key.split()[0] for item in choice.items] == [
        *("false-yes", "false-yes", "false-no", "false-no", "wrong", "wrong", "wrong-place", "wrong-place"),
        *("report", "report", "right"),
    ]
    assert all(item.kind.key == item.key.split()[0] for item in choice.items)
    assert {kind.key: total for kind, total in choice.counts.items()} == {
        "false-yes": 9,
        "false-no": 5,
        "wrong": 4,
        "wrong-place": 2,
        "report": 3,
        "right": 1,
    }
    assert {item.errs for item in choice.items} == {(True, False), (False, False)}
    assert [item.key for item in choice.items[:2]] == ["false-yes 2", "false-yes 6"]  # evenly spread


def test_each_kind_shows_other_films_where_it_can():
    rows = [asked(f"q{i}", "no", "yes", boxes=[[0.0, 0.0, 1.0, 1.0]]) for i in range(3)]
    rows += [replace(row, key=f"again {row.key}", answer="yes", prediction="no") for row in rows]
    choice = choose([arm("a", rows).evaluations("val")[0]], 1)
    assert [item.key for item in choice.items] == ["q1", "again q2"]  # q1 is the middle one of both kinds


def test_spreadsheets_compute_nothing_from_a_name():
    uri = csv_uri(["=1+1", "n"], [["@sum(a1)", -1.5], ["+1", 2], ['a "b", c', None]])
    assert table_of(uri) == [["'=1+1", "n"], ["'@sum(a1)", "-1.5"], ["'+1", "2"], ['a "b", c', ""]]


def test_tables_of_any_width_and_text_become_png():
    figure = table_figure(["$\\bad$ {", "b"], [["long " * 30, "x\ny"]] * 2, strong=[(0, 1)])
    with Image.open(io.BytesIO(decoded(png_uri(figure)))) as png:
        assert png.format == "PNG" and png.width < 1200 and len(png.convert("L").getcolors()) > 2
    wide = png_uri(table_figure([f"column {i}" for i in range(400)], [["cell"] * 400]))
    with Image.open(io.BytesIO(decoded(wide))) as png:
        assert 10_000 < png.width <= 20_000


def test_the_files_of_a_table_have_all_its_numbers(single):
    table, differences = score_table(single, "val"), find_differences(single, "val")
    ((group, places),) = [one for one in table.groups() if one[0] == "Answers"]
    head, *lines = table_of(score_download(table, group, places, differences).csv)
    assert [line[:2] for line in lines] == [
        [title, label] for title in ("low", "high") for label in ("closed accuracy", "open recall", "open exact")
    ]
    accuracy = dict(zip(head, lines[3], strict=True))
    scores = single[1].evaluations("val")[0].scores
    assert float(accuracy["value"]) == 100 * scores["closed_accuracy"]
    assert float(accuracy["difference"]) == differences.of(single[1], "closed_accuracy").value
    assert lines[0][head.index("difference")] == ""


def test_a_curve_has_its_points_and_no_markup_from_a_name(single):
    rows = [{"step": step, 'loss/"><script>': 1.0 / step} for step in (1, 2, 3)]
    (panel,) = panels([replace(single[0], runs=(replace(single[0].runs[0], title="$\\a$_", rows=rows),))])
    assert "<script" not in panel.svg and "&quot;&gt;&lt;script&gt;" in panel.svg
    lines = table_of(panel.download.csv)
    assert lines[0] == ["run", "step", "value", "smoothed"] and lines[2][:3] == ["$\\a$_", "2", "0.5"]


def test_provenance_separates_what_all_share(folder, single):
    for run in (folder / "low3", folder / "high3"):
        path = run / "evaluation" / "val" / "scores.json"
        recorded = {"step": 7, "versions": {"torch": "2.0"}, "command": f"medalign evaluate {run.name}"}
        recorded["shards"] = [["9 samples in 1 shards"]]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": recorded}))
    found = find_origin(read_arms([folder / "low3", folder / "high3"]))
    common = dict(found.common)
    assert common["seed"] == "3" and common["step"] == "7" and common["versions"] == "torch 2.0"
    assert common["evaluated data"] == "9 samples in 1 shards" and common["student"] == "\N{EN DASH}"
    assert found.labels == ["teacher", "command", "folder"]
    assert found.rows[0] == ("low3", ["clip, not used", "medalign evaluate low3", str(folder / "low3")])
    assert found.rows[1][1][0] == "clip"


def test_a_column_reads_nested_scores():
    evaluation = Evaluation(Path(), {"probes": {"blank": {"accuracy": 0.25, "accuracy_low": 0.1}, "n": 3}})
    column = Column("probes.blank.accuracy", "blank film", "probes.n")
    assert column.score(evaluation) == 25 and column.score(evaluation, "_low") == 10
    assert column.read(evaluation, column.count) == 3 and column.read(evaluation, "probes.none.n") is None


def test_evaluations_are_chosen_by_name_and_in_order(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "low3", run)
    for name in ("blank", "test"):
        shutil.copytree(run / "evaluation/val", run / "evaluation" / name)
    assert evaluation_names(read_arms([run])) == ["blank", "test", "val"]
    assert evaluation_names(read_arms([run], ["val", "blank", "absent"])) == ["val", "blank"]
    with pytest.raises(DataError, match="has no evaluation absent; choose --name from blank, test, val"):
        read_arms([run], ["absent"])


def test_every_probe_has_a_column_and_a_changed_one_shows_the_accuracy_that_is_lost():
    columns = {column.key.split(".")[1]: column for column in PAGE_COLUMNS if column.key.startswith("probes.")}
    assert columns.keys() == PROBES.keys()
    real = [asked("a", "yes", "yes"), asked("b", "left", "left"), asked("c", "no", "yes")]
    probed = [replace(row, prediction="yes") for row in real]
    evaluation = Evaluation(Path(), {"probes": {"blank": probe_scores("blank", probed, real)}})
    column = columns["blank"]
    assert column.score(evaluation) == pytest.approx(100 / 3) and column.read(evaluation, column.count) == 3
    assert column.score(evaluation, "_low") <= column.score(evaluation) <= column.score(evaluation, "_high")
