"""Samples with zero to three images, from the shards through training to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medalign.__main__ import main
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import write_shards
from medalign.observability.rows import read_rows
from medalign.phantom.records import records
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, train


def several(split: str, studies: int) -> Iterator[Record]:
    """Phantoms whose reports have zero to three images in turn: the study's own, then those of other studies."""
    seen: list[Picture] = []
    for number, record in enumerate(one for one in records(studies, 0, split) if one.fields["task"] == "report"):
        seen.append(record.images[0])
        images = tuple(seen[:-4:-1])[: number % 4]
        text = record if images else replace(record, mask=None, fields=record.fields | {"boxes": []})
        yield replace(text, images=images)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for split, studies in (("train", 16), ("val", 12)):
        assert write_shards(several(split, studies), folder / split).refused == ()
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, recipe: Path, films: Path) -> Path:
    """A run of two steps, with its evaluation."""
    run = tmp_path_factory.mktemp("runs") / "several"
    train(recipe, run, "--data.train", str(films / "train"), "--train.steps", "2", "--data.length_groups", "2")
    assert main(["evaluate", str(run), "--data", str(films / "val"), "--max-new-tokens", "4", "--batch-size", "5"]) == 0
    return run


def test_training_distils_on_them(evaluated: Path) -> None:
    rows = read_rows(evaluated / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row[f"loss/{term}"] > 0 for row in rows for term in ("language", "similarity", "attention"))
    assert rows[-1]["data/skipped"] == 0


def test_evaluation_grounds_the_first_image(evaluated: Path, films: Path) -> None:
    lines = (evaluated / "evaluation" / "val" / "predictions.jsonl").read_text().splitlines()
    index = ShardIndex.open(films / "val")
    assert index.max_images == 3
    boxed = 0
    for i, row in enumerate(map(json.loads, lines)):
        assert row["key"] == index.key(i)
        images, boxes = index.read(i).images, index.read(i).boxes
        assert len(row["attention"] or []) == (16 if images else 0)
        assert tuple(row["image_size"] or (0, 0)) == index.size(i)
        assert (row["attention_inside"] is not None) == bool(boxes)
        boxed += bool(boxes)
    assert len(lines) == 12 and boxed > 2
    assert json.loads((evaluated / "evaluation" / "val" / "scores.json").read_text())["unreadable"] == 0


def test_the_report_shows_the_first_image_with_a_note(evaluated: Path, tmp_path: Path) -> None:
    assert main(["report", str(evaluated), "--examples", "12", "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "the first of 2 images" in page and "the first of 3 images" in page
    assert "could not be read" not in page


def test_a_question_about_two_images(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("now", (90, 60)), ("before", (50, 70))):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    words = ["generate", str(evaluated), "--question", "Has it grown?", "--max-new-tokens", "2"]
    words += ["--image", str(tmp_path / "now.png"), "--image", str(tmp_path / "before.png")]
    assert main([*words, "--overlay", str(tmp_path / "map.png")]) == 0
    with Image.open(tmp_path / "map.png") as overlay:
        assert abs(overlay.width - 1.5 * overlay.height) <= 1.5  # each side is rounded to whole pixels
    (tmp_path / "before.png").write_bytes(b"broken")
    capsys.readouterr()
    assert main(words) == 2
    assert "before.png: image cannot be decoded" in capsys.readouterr().err


def test_a_limit_below_the_largest_sample_is_found_at_the_start(recipe: Path, films: Path, tmp_path: Path) -> None:
    overrides = ["--data.train", str(films / "train"), "--data.max_length", "50"]
    (process,) = start(command(recipe, tmp_path / "run", overrides), 1)
    shown = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 2
    assert "the 3 images of the largest sample with 16 tokens each take" in shown
