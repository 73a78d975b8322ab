"""SLAKE: questions keep the boxes and mask pixels of the organs that they name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medalign.data.shards.index import ShardIndex
from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture


def question(
    i: int, asked: str, answer: str, kind: str = "OPEN", lang: str = "en", image: int = 0
) -> dict[str, object]:
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": asked,
        "answer": answer,
        "q_lang": lang,
        "location": "Abdomen",
        "modality": "CT",
        "answer_type": kind,
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": i,
    }


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    folder = tmp_path / "Slake1.0"
    write_json(
        folder / "train.json",
        [
            question(0, "Where is the liver?", "Upper left"),
            question(1, "图中有肝脏吗?", "有", "CLOSED", "zh"),
            question(2, "Which plane is this?", "Transverse plane"),
            question(3, "Are the kidneys healthy?", "Yes", "CLOSED"),
            question(4, "Is the right kidney visible?", "No", "CLOSED"),
            question(5, "What is this?", "CT", image=7),
            {"img_name": None},
        ],
    )
    write_json(folder / "validate.json", [question(10, "What organ is the largest?", "Liver", image=1)])
    write_json(folder / "test.json", [question(20, "Is there a liver?", "Yes", "CLOSED", image=1)])
    (folder / "mask.txt").write_text("Abdomen\n70:Liver\n135：Left Kidney\nRight Kidney\t136\n", encoding="utf-8")
    for image in (0, 1):
        place = folder / "imgs" / f"xmlab{image}"
        write_picture(place / "source.jpg", image, 40, 24)
        gray = np.zeros((24, 40), np.uint8)
        gray[2:8, 3:13] = 70
        gray[10:14, 20:24] = 135
        gray[10:14, 30:34] = 136
        stored = gray if image else np.stack([gray, gray, gray, np.full_like(gray, 255)], -1)
        buffer = io.BytesIO()
        Image.fromarray(stored).save(buffer, "PNG")
        (place / "mask.png").write_bytes(buffer.getvalue())
        boxes = [{"Liver": [3.0, 2.0, 10.0, 6.0]}, {"Left Kidney": [20, 10, 4, 4]}, {"Right Kidney": [30, 10, 99, 4]}]
        write_json(place / "detection.json", boxes)
    return folder


def test_boxes_and_masks_of_the_named_organs(slake: Path, tmp_path: Path) -> None:
    account = pack("slake", slake, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 4, "val": 1, "test": 1}
    index = ShardIndex.open(tmp_path / "out" / "train")
    liver, plane, kidneys, right = samples(tmp_path / "out" / "train")
    assert (liver.question, liver.answer, liver.answer_type) == ("Where is the liver?", "Upper left", "open")
    assert liver.boxes == ((3, 2, 13, 8),)
    assert plane.boxes == ()
    assert kidneys.boxes == ((20, 10, 24, 14), (30, 10, 40, 14))  # the second one is clipped at the edge of the image
    assert kidneys.answer_type == "closed"
    assert right.boxes == ((30, 10, 40, 14),)
    assert [region["label"] for region in plane.metadata["regions"]] == ["Liver", "Left Kidney", "Right Kidney"]
    assert plane.metadata["case"] == "xmlab0"
    masks = [index.read_mask(i) for i in range(4)]
    assert masks[1] is None
    areas = [int(np.asarray(mask).astype(bool).sum()) for mask in masks if mask is not None]
    assert areas == [60, 32, 16]
    assert samples(tmp_path / "out" / "val")[0].boxes == ((3, 2, 13, 8),)  # named by the answer


def test_what_is_skipped(slake: Path, tmp_path: Path) -> None:
    account = pack("slake", slake, tmp_path / "out")
    assert account.reasons() == {
        "language is zh, which is not in --languages": 1,
        "the question has no img_name": 1,
        "image ... cannot be read": 1,
    }
    assert "xmlab7/source.jpg" in skipped(account)["slake-train-00005"]
    both = pack("slake", slake, tmp_path / "both", languages=["en", "zh"])
    assert both.splits["train"].written == 5
    assert samples(tmp_path / "both" / "train")[1].metadata["language"] == "zh"


def test_damaged_annotations(slake: Path, tmp_path: Path) -> None:
    place = slake / "imgs" / "xmlab1"
    write_json(place / "detection.json", [{"Liver": [1, 2, 3]}])
    assert "not x, y, width, height" in skipped(pack("slake", slake, tmp_path / "a"))["slake-val-00000"]
    (place / "detection.json").write_text("{")
    assert skipped(pack("slake", slake, tmp_path / "b"))["slake-test-00000"] == "detection.json is not JSON"
    for box in ([1, 2, float("nan"), 3], [1, 2, float("inf"), 3], [True, 2, 3, 4]):
        write_json(place / "detection.json", [{"Liver": box}])
        assert "not x, y, width, height" in skipped(pack("slake", slake, tmp_path / "a"))["slake-val-00000"]
    (slake / "mask.txt").write_bytes("70:Le\xf6ver".encode("cp1252"))
    with pytest.raises(DataError, match=r"mask\.txt is not UTF-8"):
        pack("slake", slake, tmp_path / "c")
    (slake / "mask.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"mask\.txt lists no gray value"):
        pack("slake", slake, tmp_path / "c")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    write_json(tmp_path / "train.json", [])
    with pytest.raises(DataError, match="validate.json or validation.json: the questions of the val split") as caught:
        pack("slake", tmp_path, tmp_path / "out")
    assert "test.json" in str(caught.value)
    assert "mask.txt" in str(caught.value)
    assert "SLAKE 1.0" in str(caught.value)
    assert not (tmp_path / "out").exists()
