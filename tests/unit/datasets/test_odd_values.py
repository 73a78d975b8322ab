"""Values that are not text, in every field of JSON data sets: refused by name or ignored, never used as words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medalign.data.samples.sample import BadSample
from medalign.datasets.texts import as_text, field, text
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture

HALF = "ok \ud83d"  # the first half of an emoji


def nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


MISSING = {"null": None, "NaN": float("nan"), "nan": "nan", "NaT": "NaT", "white space": " \n"}
ODD = {
    "infinity": float("inf"),
    "true": True,
    "list": ["left", "right"],
    "object": {"a": 1},
    "half an emoji": HALF,
    "400 digits": 10**400,
    "200 levels": nested(200),
    "700 levels": nested(700),
}


def vqa_rad(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "VQA_RAD Image Folder" / "a.jpg", 1)
    write_json(folder / "VQA_RAD Dataset Public.json", rows)


def omnimedvqa(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "Images" / "a.jpg", 1)
    write_json(folder / "QA_information" / "Open-access" / "Set.json", rows)


def slake(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "imgs" / "a" / "source.jpg", 1)
    (folder / "mask.txt").write_text("70:Liver\n")
    for split in ("train", "validate", "test"):
        write_json(folder / f"{split}.json", rows if split == "train" else [])


def r2gen(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "images" / "a.png", 1)
    write_json(folder / "annotation.json", {"train": rows, "val": None, "test": []})


def llava(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "images" / "a.jpg", 1)
    for row in rows:
        row["conversations"] = [
            {"from": "human", "value": row.pop("question")},
            {"from": "gpt", "value": row.pop("answer")},
        ]
    write_json(folder / "train.json", rows)


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_picture(folder / "a.jpg", 1)
    (folder / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))


ASKED = {"question": "Is it bright?", "answer": "yes"}
CHOICES = {"option_A": "yes", "option_B": "no", "option_C": "2", "gt_answer": "yes"}
# Per data set: how it is written, a good row, the fields that must be text, and the other fields that are read.
SOURCES: dict[str, tuple[Callable, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "vqa-rad": (
        vqa_rad,
        {**ASKED, "image_name": "a.jpg", "phrase_type": "freeform"},
        ("question", "answer", "image_name"),
        ("image_case_url", "phrase_type", "answer_type", "qid", "image_organ", "question_type"),
    ),
    "omnimedvqa": (
        omnimedvqa,
        {**ASKED, **CHOICES, "image_path": "Images/a.jpg"},
        ("question", "gt_answer", "image_path"),
        ("option_A", "option_B", "option_C", "question_id", "dataset", "question_type", "modality_type", "modality"),
    ),
    "slake": (
        slake,
        {**ASKED, "img_name": "a/source.jpg", "q_lang": "en"},
        ("question", "answer", "img_name", "q_lang"),
        ("answer_type", "qid", "modality", "location", "content_type", "base_type", "triple"),
    ),
    "r2gen": (r2gen, {"id": "C1", "report": "Clear.", "image_path": ["a.png"]}, ("id", "report", "image_path"), ()),
    "llava": (
        llava,
        {**ASKED, "id": "1", "image": "a.jpg"},
        ("question", "answer"),
        ("id", "domain", "answer_type", "image", "images"),
    ),
    "jsonl": (
        jsonl,
        {**ASKED, "id": "good", "task": "vqa", "image": "a.jpg"},
        ("id", "question", "answer", "task"),
        ("answer_type", "split", "mask", "image", "age"),
    ),
}


def write_odd(name: str, folder: Path, fields: tuple[str, ...], values: dict[str, Any]) -> int:
    """Write a good row, and one per field and value. Returns the number of these rows."""
    write, good, _, _ = SOURCES[name]
    odd = [(field, value) for field in fields for value in values.values()]
    rows = [{**good, "id": f"n{i}", field: value} for i, (field, value) in enumerate(odd)]
    write(folder, [dict(good), *rows])
    return len(rows)


@pytest.mark.parametrize("name", SOURCES)
def test_fields_that_must_be_text(tmp_path: Path, name: str) -> None:
    values = MISSING | ODD
    if name == "jsonl":  # in the user's own file, these words are ordinary text
        values = {label: value for label, value in values.items() if label not in ("nan", "NaT")}
    count = write_odd(name, tmp_path / "in", SOURCES[name][2], values)
    account = pack(name, tmp_path / "in", tmp_path / "out")
    assert (account.written, len(account.skipped)) == (1, count), skipped(account)


@pytest.mark.parametrize("name", SOURCES)
def test_fields_that_may_be_left_out(tmp_path: Path, name: str) -> None:
    count = write_odd(name, tmp_path / "in", SOURCES[name][3], MISSING | ODD)
    account = pack(name, tmp_path / "in", tmp_path / "out")
    written = [sample for split in account.splits for sample in samples(tmp_path / "out" / split)]
    assert len(written) + len(account.skipped) == count + 1
    assert len(written) >= 1
    if name != "jsonl":
        message = json.dumps([[s.question, s.answer, s.metadata] for s in written])
        assert re.findall(r"\b(?:nan|nat|inf|Infinity)\b", message, re.IGNORECASE) == []


def test_text_of_annotation_values() -> None:
    assert [text(one) for one in (3, 2.0, 1e-7, " a\n b ", "NaN is rare", "None", "null")] == [
        "3",
        "2.0",
        "1e-07",
        "a b",
        "NaN is rare",
        "None",
        "null",
    ]
    assert [as_text(one, "answer") for one in MISSING.values()] == [""] * len(MISSING)
    assert as_text(" a\nb ", "answer") == " a\nb "
    for label in ("infinity", "true", "list", "object", "700 levels"):
        with pytest.raises(BadSample, match=r"^answer is .*, which is not text$"):
            field({"answer": ODD[label]}, "answer")
        assert text(ODD[label]) == ""
