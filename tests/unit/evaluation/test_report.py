from __future__ import annotations

import json
import re
import shutil
import tarfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from medalign import phantom
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import build_index
from medalign.errors import ConfigError, DataError
from medalign.evaluation.metrics import read_predictions, score, write_predictions
from medalign.evaluation.report.curves import SERIES, panels, smoothed
from medalign.evaluation.report.page import format_table, write_report
from medalign.evaluation.report.runs import config_differences, read_arms
from tests.unit.evaluation.runs_on_disk import make_run

BASE = {"train": {"steps": 0}, "losses": {"alpha": 0.0, "beta": 0.0}, "note": "a < b & c"}
FULL = {"train": {"steps": 200}, "losses": {"alpha": 1.0, "beta": 0.06}, "note": "a < b & c"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    phantom.write_phantoms(folder / "shards", 1, 6, 0)
    make_run(folder / "base", folder / "shards" / "val", skill=0.3, aim=0.0, steps=0, config=BASE)
    make_run(folder / "full", folder / "shards" / "val", skill=0.9, aim=0.6, steps=200, config=FULL)
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """Copies of two runs and their shards, which a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*/evaluation/val/scores.json"):
        path.write_text(path.read_text().replace(str(made), str(tmp_path)))
    return [tmp_path / "base", tmp_path / "full"]


@pytest.fixture
def uncurved(runs):
    """The same without logged steps: a page is written faster without curves."""
    (runs[1] / "metrics.jsonl").unlink()
    return runs


class Page(HTMLParser):
    """Counts tags and checks that they close in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "input", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_self_contained(runs, tmp_path):
    write_report(runs, tmp_path / "out" / "report.html", examples=1)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.counts["img"] == page.counts["article"] * (1 + 2)  # the image, and an overlay for each run
    assert page.counts["svg"] == 5  # three losses, their total, the gradient norm
    assert page.counts["script"] == 1 and not page.counts.get("link") and "@import" not in text
    assert set(re.findall(r"(?:src|href)=\"([a-z]+:?)", text)) <= {"data:"}
    assert not re.search(r"url\((?!#)", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert "without the image" in text and "area" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


def test_numbers_are_written_as_json(runs, tmp_path):
    arms = [f"the base={runs[0]}", f"the full={runs[1]}"]
    write_report(arms, tmp_path / "report.html", examples=0)
    data = json.loads((tmp_path / "report.json").read_text())
    scores = score(read_predictions(runs[1] / "evaluation" / "val" / "predictions.jsonl"))
    (table,) = data["tables"]
    assert table["name"] == "val" and [row["run"] for row in table["rows"]] == ["the base", "the full"]
    # the file keeps every digit of the scores; attention is not part of them
    assert {key: table["rows"][1][key] for key in scores} == scores
    assert data["training"][0]["steps"] is None and data["training"][1]["steps"] == 200
    assert data["training"][1]["truncated"] == 2  # the last row's total
    page = (tmp_path / "report.html").read_text()
    assert "spread evenly over the data set" not in page and "texts of the evaluation data" not in page


def test_missing_shards_are_reported_and_the_rest_is_shown(runs, tmp_path):
    shutil.rmtree(tmp_path / "shards")
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "could not be read from the shards" in text and str(tmp_path / "shards" / "val") in text
    assert not page.counts.get("img") and page.counts["svg"] == 5 and page.counts["article"] >= 4
    assert "This page contains texts of the evaluation data" in text


def test_other_samples_with_the_same_keys_are_detected(uncurved, tmp_path):
    path = uncurved[0] / "evaluation" / "val" / "predictions.jsonl"
    rows = read_predictions(path)
    for row in rows:
        row.question = "What is this?"
    write_predictions(path, rows)
    write_report(uncurved, tmp_path / "report.html", examples=1)
    assert "is not the one that was evaluated" in (tmp_path / "report.html").read_text()


def test_keys_with_slashes_are_not_paths(made, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (source,) = (made / "shards" / "val").glob("*.tar")
    with tarfile.open(source) as old, tarfile.open(theirs / "a.tar", "w") as new:
        for member in old:
            content = old.extractfile(member)
            member.name = f"set/part.1/{member.name}"
            new.addfile(member, content)
    assert build_index(theirs).refused == ()
    before = {path for path in tmp_path.rglob("*") if path.is_dir()}
    make_run(tmp_path / "run", theirs, skill=0.9, aim=0.6, steps=0, config=BASE)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert Page(text).counts["img"] >= 6 and "<code>set/part.1/" in text
    made_folders = {path for path in tmp_path.rglob("*") if path.is_dir()} - before
    assert {path.name for path in made_folders} == {"run", "evaluation", "theirs"}


def test_predictions_without_attention_still_show_the_image(uncurved, tmp_path):
    for run in uncurved:
        path = run / "evaluation" / "val" / "predictions.jsonl"
        rows = read_predictions(path)
        for row in rows:
            row.attention = None
        write_predictions(path, rows)
    write_report(uncurved, tmp_path / "report.html", examples=1)
    page = Page((tmp_path / "report.html").read_text())
    assert page.counts["img"] == page.counts["article"] > 2


def test_the_text_table_is_aligned(runs):
    lines = format_table(runs).splitlines()
    assert [line.split()[0] for line in lines] == ["val", "n", "base", "full", "(chance)"]
    ends = [[match.end() for match in re.finditer(r"\*?\d+\.\d(?!\d)", line)] for line in lines[2:4]]
    assert ends[0] == ends[1] and len(ends[0]) == 7
    assert lines[3].count("*") >= 5 and "*" not in lines[2]
    chance = [float(text) for text in lines[4].split()[1:]]
    scores = json.loads((runs[0] / "evaluation" / "val" / "scores.json").read_text())
    assert chance == [round(100 * scores[k], 1) for k in ("closed_majority", "box_area", "pointing_chance")]


def test_one_run_has_no_best_and_runs_with_different_data_share_a_report(uncurved, tmp_path):
    assert "*" not in format_table(uncurved[:1])
    (uncurved[1] / "evaluation" / "val").rename(uncurved[1] / "evaluation" / "other")
    tables = format_table(uncurved).split("\n\n")
    assert [table.split()[0] for table in tables] == ["val", "other"]
    assert "full" not in tables[0] and "base" not in tables[1]
    write_report(uncurved, tmp_path / "report.html", examples=1)
    Page((tmp_path / "report.html").read_text())


def facts(run, **values):
    path = run / "evaluation" / "val" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_answers_that_were_cut_off_or_are_empty_are_reported(uncurved, tmp_path):
    path = uncurved[1] / "evaluation" / "val" / "predictions.jsonl"
    rows = read_predictions(path)
    for row in rows:
        row.prediction, row.empty, row.finish_reason = "", True, "length"
    write_predictions(path, rows)
    facts(uncurved[1], max_new_tokens=4, answers_cut=len(rows), answers_empty=len(rows))
    write_report(uncurved, tmp_path / "report.html", examples=1)
    page = (tmp_path / "report.html").read_text()
    shown = Page(page).counts["article"]
    share = f"{len(rows)} of {len(rows)} answers"
    for line in (f"full: {share} were cut off at 4 tokens (--max-new-tokens)", f"full: {share} are empty"):
        assert line in format_table(uncurved).splitlines() and line in page
    assert page.count("(empty answer)") == page.count('<span class="mark">cut off</span>') == shown
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["tables"][0]["rows"][1]["answers_cut"] == len(rows)


def test_runs_evaluated_with_different_limits_are_reported(uncurved, tmp_path):
    facts(uncurved[0], max_new_tokens=64, max_length=160)
    assert "differs" not in format_table(uncurved)  # the other one is an older file without limits
    facts(uncurved[1], max_new_tokens=128, max_length=160)
    line = "max_new_tokens differs, so the scores cannot be compared: base 64, full 128"
    assert format_table(uncurved).splitlines()[-1] == line
    write_report(uncurved, tmp_path / "report.html", examples=0)
    page = (tmp_path / "report.html").read_text()
    assert line in page and "Answers have at most 64 or 128 new tokens." in page
    facts(uncurved[0], max_new_tokens=128)
    assert "differs" not in format_table(uncurved)
    write_report(uncurved, tmp_path / "report.html", examples=0)
    assert "Answers have at most 128 new tokens." in (tmp_path / "report.html").read_text()


def test_only_settings_that_differ_are_listed(runs):
    assert config_differences(read_arms(runs)) == [
        ("losses.alpha", ["0.0", "1.0"]),
        ("losses.beta", ["0.0", "0.06"]),
        ("train.steps", ["0", "200"]),
    ]
    (runs[0] / "config.yaml").unlink()
    assert config_differences(read_arms(runs)) == []


def test_titles_distinguish_runs(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "again" / "base")
    assert [arm.title for arm in read_arms([runs[0], tmp_path / "again" / "base"])] == [
        f"{tmp_path.name}/base",
        "again/base",
    ]
    assert len({arm.title for arm in read_arms([runs[0], runs[0]])}) == 2


def test_bad_folders_are_an_error(runs, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(DataError, match="medalign evaluate"):
        write_report([tmp_path / "shards"], tmp_path / "report.html")
    with pytest.raises(DataError, match="no runs"):
        format_table([])
    with pytest.raises(ConfigError, match=r"different names: one, one; write NAME=PATH"):
        format_table([f"one={run}" for run in runs])
    with pytest.raises(ConfigError, match="arm twice names the same run twice"):
        format_table([f"twice={runs[0]},{runs[0]}"])
    (runs[0] / "evaluation" / "val" / "scores.json").write_text("{")
    with pytest.raises(DataError, match="scores.json is not JSON"):
        format_table(runs)
    assert not (tmp_path / "report.html").exists()


def test_curves_use_the_colors_of_the_page(runs):
    drawn = panels(read_arms(runs))
    assert [panel.title for panel in drawn][:2] == ["total loss", "language loss"]
    for panel in drawn:
        assert "var(--series-1)" in panel.svg and "var(--series-0)" not in panel.svg  # the base was not trained
        assert not re.search(r"#0102|DejaVu|<metadata", panel.svg)
        assert f"var(--series-{SERIES})" not in panel.svg


def test_every_loss_that_a_run_logged_is_drawn(runs):
    rows = [
        {"step": step, "loss/z_loss": 2.0 / step, "loss/total": 1.0, "validation/loss/total": 1.5, "data/skipped": 0}
        for step in (1, 2, 3)
    ]
    arms = [replace(arm, runs=(replace(arm.runs[0], rows=rows),)) for arm in read_arms(runs)]
    titles = [panel.title for panel in panels(arms)]
    assert titles == ["total loss", "loss term z_loss", "validation: total loss"]


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert smoothed(np.full(50, 3.0), 7) == pytest.approx(np.full(50, 3.0))
    line = np.arange(200.0)
    # The weights are 0.75^n at distance n, so an end of the line, 50 values away, changes an average by 200 * 0.75^50.
    assert smoothed(line, 7)[50:150] == pytest.approx(line[50:150], abs=200 * 0.75**50)
    assert len(smoothed(np.array([2.0]), 7)) == 1


def test_the_shards_of_these_tests_contain_boxes(made):
    index = ShardIndex.open(made / "shards" / "val")
    assert any(index.read(i).boxes for i in range(len(index)))
