"""EH-Benchmark: lists of lettered questions, with the images that their ids name."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture


def question(image: str, answer: object = "B", **changes: object) -> dict[str, object]:
    asked = "In OCT, what type of lesion is marked?\nA. soft drusen\nB. retinal fluid, of any kind\nC. hard drusen"
    return {"id": image, "question": asked, "answer": answer} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "eh"
    rows = [
        question("images/a.png"),
        question("images/a.png", "c"),
        question("images/b.jpg", question="\nGrade?\nA) none\nB) mild\n"),
        question("images/lost.png"),
        question("images/a.png", "D"),
        question("images/a.png", None),
        question("images/a.png", question="Is it?"),
        question("images/a.png", question="Is it?\nA. yes\nC. no"),
        question("images/a.png", question={"a": 1}),
        {"question": "?", "answer": "A"},
        question("../outside.png"),
    ]
    write_json(place / "OCT5k.json", rows)
    write_json(place / "GRAPE" / "GRAPE.json", [question("images/g.png"), question("images/a.png")])
    for name in ("images/a.png", "images/b.jpg", "GRAPE/images/g.png"):
        write_picture(place / name, len(name))
    write_picture(tmp_path / "outside.png", 0)
    return place


def test_lettered_questions(folder: Path, tmp_path: Path) -> None:
    account = pack("eh-benchmark", folder, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"test": 5}
    found = {sample.key: sample for sample in samples(tmp_path / "out" / "test")}
    first = found["eh-OCT5k-000000"]
    assert first.question == (
        "In OCT, what type of lesion is marked? A. soft drusen B. retinal fluid, of any kind C. hard drusen"
    )
    assert (first.answer, first.answer_type) == ("B", "closed")
    assert first.metadata["options"] == ["soft drusen", "retinal fluid, of any kind", "hard drusen"]
    assert (found["eh-OCT5k-000001"].answer, found["eh-OCT5k-000002"].metadata["options"]) == ("C", ["none", "mild"])
    own, shared = found["eh-GRAPE-GRAPE-000000"], found["eh-GRAPE-GRAPE-000001"]  # beside the list, or of the folder
    assert (own.metadata["dataset"], own.metadata["case"]) == ("GRAPE", "GRAPE/images/g.png")
    assert shared.images[0].tobytes() == first.images[0].tobytes()
    assert shared.metadata["case"] == first.metadata["case"] == "images/a.png"  # so that both are in the same split


def test_what_is_skipped(folder: Path, tmp_path: Path) -> None:
    found = skipped(pack("eh-benchmark", folder, tmp_path / "out"))
    assert "lost.png" in found["eh-OCT5k-000003"]
    assert found["eh-OCT5k-000004"] == "answer is 'D', which is not the letter of one of its 3 choices"
    assert found["eh-OCT5k-000005"].startswith("answer is ''")
    assert found["eh-OCT5k-000006"].startswith("question has the choices none; it must list A, B, ...")
    assert found["eh-OCT5k-000007"].startswith("question has the choices AC")
    assert "which is not text" in found["eh-OCT5k-000008"]
    assert "the question has no id" in found.values()
    assert "is outside the folder" in found["eh-OCT5k-000010"]
    assert len(found) == 8


def test_shares_and_missing_files(folder: Path, tmp_path: Path) -> None:
    account = pack("eh-benchmark", folder, tmp_path / "train", test_share=0.0)
    assert {name: report.written for name, report in account.splits.items()} == {"train": 5}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"\*\.json: the questions"):
        pack("eh-benchmark", tmp_path / "empty", tmp_path / "none")
