"""VQA-RAD: the published split, and one in which no image is in both parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture


@pytest.fixture
def vqa_rad(tmp_path: Path) -> Path:
    """24 questions on 8 images of 6 cases; every image has a published test question."""
    folder = tmp_path / "VQA_RAD"
    rows = []
    for i in range(24):
        image = i % 8
        case = min(image, 5)  # the last case has three images
        rows.append(
            {
                "qid": str(i),
                "phrase_type": ("freeform", "para", "test_freeform")[i // 8],
                "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
                "image_case_url": f"https://medpix.nlm.nih.gov/case?id=case-{case}",
                "image_name": f"synpic{image}.jpg",
                "image_organ": "CHEST",
                "evaluation": "evaluated",
                "question": "How many   nodules?",
                "question_type": "COUNT",
                "answer": i if i % 2 else "None",
                "answer_type": "CLOSED " if i % 2 else "OPEN",
            }
        )
    write_json(folder / "VQA_RAD Dataset Public.json", [*rows, {"question": "?"}])
    for image in range(8):
        write_picture(folder / "VQA_RAD Image Folder" / f"synpic{image}.jpg", image)
    return folder


def test_published_split(vqa_rad: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    account = pack("vqa-rad", vqa_rad, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 16, "test": 8}
    assert account.reasons() == {"the question has no image_name": 1}
    assert "--split image avoids this" in caplog.text
    train, test = samples(tmp_path / "out" / "train"), samples(tmp_path / "out" / "test")
    assert {s.metadata["case"] for s in test} <= {s.metadata["case"] for s in train}  # which the other split avoids
    first = train[1]
    assert (first.question, first.answer, first.answer_type) == ("How many nodules?", "1", "closed")
    assert (first.metadata["organ"], first.metadata["phrase_type"], first.key) == ("CHEST", "freeform", "vqarad-0001")


def test_split_by_image_and_case(vqa_rad: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack("vqa-rad", vqa_rad, tmp_path / "out", split="image", test_share=0.5)
    sides = [samples(tmp_path / "out" / side) for side in ("train", "test")]
    images = [{s.metadata["case"] for s in side} for side in sides]
    assert sum(map(len, sides)) == 24
    assert caplog.text == ""
    assert images[0].isdisjoint(images[1])
    assert min(map(len, images)) > 0
    last_case = {"synpic5.jpg", "synpic6.jpg", "synpic7.jpg"}
    assert last_case <= images[0] or last_case <= images[1]


def test_a_question_without_a_case_url_stays_with_its_image(vqa_rad: Path, tmp_path: Path) -> None:
    path = vqa_rad / "VQA_RAD Dataset Public.json"
    rows = json.loads(path.read_text())
    for row in rows[:8]:  # one of the three questions of each image
        row["image_case_url"] = float("nan")
    write_json(path, rows)
    pack("vqa-rad", vqa_rad, tmp_path / "out", split="image", test_share=0.5)
    images = [{s.metadata["case"] for s in samples(tmp_path / "out" / side)} for side in ("train", "test")]
    assert images[0].isdisjoint(images[1])
    assert len(images[0] | images[1]) == 8


@pytest.mark.parametrize("split", ["published", "image"])
def test_a_phrase_type_that_determines_no_split_is_refused(vqa_rad: Path, tmp_path: Path, split: str) -> None:
    path = vqa_rad / "VQA_RAD Dataset Public.json"
    rows = json.loads(path.read_text())
    odd = [["test_freeform"], "Test question", None, "Test_Para "]
    for row, value in zip(rows, odd, strict=False):
        row["phrase_type"] = value
    del rows[4]["phrase_type"]
    write_json(path, rows)
    account = pack("vqa-rad", vqa_rad, tmp_path / "out", split=split, test_share=0.5)
    found = skipped(account)
    name = path.name
    assert sorted(found) == [f"{name} entry {i}" for i in (0, 1, 2, 24, 4)]
    message = "it must be one of freeform, para, test_freeform, test_para"
    assert found[f"{name} entry 1"] == f"phrase_type is 'Test question', which determines no split; {message}"
    if split == "published":
        assert "vqarad-0003" in {s.key for s in samples(tmp_path / "out" / "test")}


def test_missing_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    with pytest.raises(DataError, match=r"VQA_RAD Dataset Public\.json: the questions\n.*osf\.io/89kps"):
        pack("vqa-rad", tmp_path, tmp_path / "out")
    (tmp_path / "VQA_RAD Dataset Public.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="contains a JSON dict; it must be a list"):
        pack("vqa-rad", tmp_path, tmp_path / "out")
