"""`medalign ground` on a tiny student: what it writes, and what it leaves to the next call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medalign import phantom
from medalign.__main__ import main
from medalign.data.batches.reader import prepare
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.data.shards.writer import write_shards
from medalign.evaluation.ground_records import Grounded, summarize
from medalign.geometry import PatchGrid
from tests import tiny

OPTIONS = ["--batch-size", "1", "--steps", "2", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    phantom.write_phantoms(folder, train=1, val=3, seed=0)
    return folder / "val"


@pytest.fixture
def run(student_folder, tmp_path) -> Path:
    return tiny.save_run(tmp_path / "run", student_folder)


def ground(run: Path, data: Path, name: str, limit: int) -> dict:
    assert main(["ground", str(run), "--data", str(data), "--name", name, "--limit", str(limit), *OPTIONS]) == 0
    return json.loads((run / "evaluation" / name / "grounding.json").read_text())


def test_an_interrupted_measurement_continues_and_gives_the_same_files(run, data, capsys):
    whole, folder = ground(run, data, "whole", 4), run / "evaluation"
    table = capsys.readouterr().out
    assert "inside the boxes" in table and "inside the mask" in table and "deletion" in table and "block 2" in table
    ground(run, data, "parts", 2)
    lines = folder / "parts" / "grounding.jsonl"
    lines.write_text(lines.read_text() + '{"key": "cut')  # a line whose end was not written
    parts = ground(run, data, "parts", 4)
    for file in ("grounding.jsonl", "grounding_heads.csv"):
        assert (folder / "whole" / file).read_bytes() == (folder / "parts" / file).read_bytes()
    assert {**parts, "command": ""} == {**whole, "command": ""}

    assert (whole["n"], whole["masks"], whole["limit"]) == (4, 4, 4) and whole["answers_empty"] == 0
    heads = (folder / "whole" / "grounding_heads.csv").read_text().splitlines()
    assert len(heads) == 1 + 2 * 3 * 4  # rows, blocks, heads
    boxed = [one for one in map(ShardIndex.open(data).read, range(12)) if one.boxes][:4]
    records = [json.loads(line) for line in lines.read_text().splitlines()[1:]]
    assert [one["key"] for one in records] == [sample.key for sample in boxed]
    assert whole["question_mask"]["inside_uniform"] <= whole["question"]["inside_uniform"]

    lines.write_text(lines.read_text().replace('"steps": 2', '"steps": 3', 1))
    assert ground(run, data, "parts", 1)["n"] == 1  # with other settings, it starts again
    assert len(lines.read_text().splitlines()) == 2


def test_an_answer_without_text_has_no_answer_maps_and_no_curves(run, data, monkeypatch):
    from medalign.evaluation.generation import Answer

    monkeypatch.setattr("medalign.grounding.generate_answers", lambda *given: [Answer("", None)])
    found = ground(run, data, "empty", 2)
    assert found["answers_empty"] == found["n"] == 2 and "inside" in found["question"]
    assert not {"answer", "answer_mask", "removal"} & set(found) and list(found["heads"]) == ["question"]


def test_an_answer_and_a_question_that_cannot_be_encoded_are_counted(run, data, monkeypatch, tmp_path):
    """A sample that the template rejects is not measured; an answer that it rejects has no maps."""
    from medalign.evaluation.generation import Answer

    monkeypatch.setattr("medalign.grounding.generate_answers", lambda *given: [Answer("\ufdd0", None)])
    found = ground(run, data, "rejected", 2)
    assert found["answers_empty"] == found["n"] == 2 and "answer" not in found
    monkeypatch.undo()

    def reject(collator, sample):
        if sample.key == rejected and not collator.with_answer:
            raise BadSample("the template rejects it")
        return prepare(collator, sample)

    rejected = next(sample.key for sample in map(ShardIndex.open(data).read, range(12)) if sample.boxes)
    monkeypatch.setattr("medalign.grounding.prepare", reject)
    found = ground(run, data, "bad", 2)
    assert (found["n"], found["unreadable"]) == (2, 1)


def test_shards_without_boxes_are_refused_and_replace_nothing(run, data, tmp_path, capsys):
    ground(run, data, "shards", 1)
    measured = run / "evaluation" / "shards" / "grounding.jsonl"
    before = measured.read_bytes()
    fields = {"task": "vqa", "question": "Normal?", "answer": "yes", "answer_type": "closed"}
    write_shards([Record("a", (), fields)], tmp_path / "shards")
    assert main(["ground", str(run), "--data", str(tmp_path / "shards")]) == 2
    assert "has boxes inside its image" in capsys.readouterr().err
    assert measured.read_bytes() == before


def record(key: str, image: str, patch: int, inside: float) -> Grounded:
    """A sample on a grid of 2 x 2 patches whose box is patch 0."""
    map_N = [float(patch == i) for i in range(4)]
    values = {"image_size": (2, 2), "boxes": [[0, 0, 1, 1]], "mask": None, "maps": {"question": map_N}}
    heads = {"inside": {"question": [[inside, 0.5]]}, "on_image": {"question": [[1.0, 1.0]]}}
    return Grounded(key=key, image=image, removal=None, **values, **heads)


def test_each_image_counts_once():
    found = summarize([record("a", "x", 0, 1.0), record("b", "x", 0, 0.6), record("c", "y", 1, 0.0)], PatchGrid(2, 2))
    assert (found["question"]["inside"], found["question"]["pointing_hits"]) == (0.5, 0.5)
    assert found["question"]["inside_uniform"] == found["question"]["pointing_chance"] == 0.25
    assert found["heads"]["question"]["inside"] == [[pytest.approx(0.4), 0.5]]
    assert (found["n"], found["images"], found["answers_empty"]) == (3, 2, 3)
