"""LLaVA's conversations: each turn a sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversion import pack, samples, skipped, write_json, write_picture

from medalign.errors import DataError


def talk(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]


ROWS = [
    {
        "id": "25752079",
        "image": "25752079_F2.jpg",
        "domain": {"chest_xray": True, "mri": False},
        "conversations": talk("<image>\nWhat is seen?", "A nodule.", "Where?\nSay exactly.", "Left."),
    },
    {"id": "t", "conversations": talk("What is a nodule?", "A small round growth.")},
    {"id": "odd", "image": "25752079_F2.jpg", "conversations": talk("Alone?")},
    {"id": "none", "image": "none.jpg", "conversations": talk("Is it?\n<image>", "Yes")},
    {"id": "no"},
]


def test_turns_become_samples(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_json(folder / "llava_med_instruct_60k.json", ROWS)
    write_picture(folder / "images" / "25752079_F2.jpg", 1)
    account = pack("llava", folder, tmp_path / "out")
    first, second, without = samples(tmp_path / "out" / "train")
    assert (first.question, first.answer, first.answer_type) == ("What is seen?", "A nodule.", "open")
    assert (second.question, second.metadata["turn"]) == ("Where?\nSay exactly.", 1)
    assert first.metadata["domain"] == ["chest_xray"]
    assert first.key == "llava_med_instruct_60k-0000000-0"
    assert first.images[0].size == second.images[0].size
    assert without.images == ()
    assert skipped(account) == {
        "llava_med_instruct_60k.json entry 2": "conversation is not human and gpt in turn",
        "llava_med_instruct_60k.json entry 4": "no list of conversations",
        "llava_med_instruct_60k-0000003-0": "image 'none.jpg' cannot be read: No such file or directory",
    }


def test_several_images_before_one_question(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in "abc":
        write_picture(folder / "images" / f"{name}.jpg", ord(name), 30 + ord(name) - ord("a"))
    told = talk("<image>\n<image>\nWhat has changed from <image>?", "It grew.")
    lists = [["b.jpg", "a.jpg"], ["b.jpg", "c.jpg"], "b.jpg", ["a.jpg"], []]
    rows = [{"id": str(i), "image": names, "conversations": told} for i, names in enumerate(lists)]
    write_json(folder / "all.json", rows)
    account = pack("llava", folder, tmp_path / "out", test_share=0.5)
    assert account.written == 5
    by_side = {side: {s.metadata["id"]: s for s in samples(tmp_path / "out" / side)} for side in account.splits}
    first = next(found["0"] for found in by_side.values() if "0" in found)
    assert first.question == "What has changed from ?"
    assert ([image.width for image in first.images], first.metadata["image"]) == ([31, 30], ["b.jpg", "a.jpg"])
    assert any({"0", "1", "2"} <= found.keys() for found in by_side.values())  # one first image, one side


def test_files_are_splits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_picture(folder / "a.png", 1)  # without images/, paths start at the folder
    closed = {"image": "a.png", "answer_type": "CLOSED", "conversations": talk("<image>\nIs it?", "Yes")}
    write_json(folder / "train.json", [closed])
    write_json(folder / "test.json", [closed])
    write_json(folder / "settings.json", [{"lr": 1}])
    with pytest.raises(DataError, match=r"settings\.json holds no conversations; .*--annotations"):
        pack("llava", folder, tmp_path / "out")
    account = pack("llava", folder, tmp_path / "out", annotations=["train.json", "test.json"])
    assert {name: report.written for name, report in account.splits.items()} == {"train": 1, "test": 1}
    assert samples(tmp_path / "out" / "test")[0].answer_type == "closed"


def test_file_names_become_names_of_folders(tmp_path: Path) -> None:
    for name in ("train v1.2", "-test", ".val"):
        write_json(tmp_path / "in" / f"{name}.json", [{**ROWS[0], "image": None}])
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert sorted(account.splits) == ["_test", "_val", "train_v1_2"]
    assert account.skipped == []


def test_missing_pieces(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a \.json file with the conversations"):
        pack("llava", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.json: conversations"):
        pack("llava", tmp_path, tmp_path / "out", annotations=["train.json"])
