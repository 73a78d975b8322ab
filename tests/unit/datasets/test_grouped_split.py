"""Lines without a split are assigned so that no image and no patient is in two splits, in any order of lines."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from medalign.__main__ import main
from medalign.datasets.splitting import Groups, split_by_hash, unit_hash
from medalign.errors import ConfigError
from tests.unit.data.tiny_data import picture
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture

EMPTY = "patient is empty; --group-by patient requires a value in each line"


def row(i: int, image: Any, **more: Any) -> dict[str, Any]:
    return {"id": f"q{i}", "image": image, "task": "vqa", "question": "clear ?", "answer": "yes", **more}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    for name in {name for one in rows for name in listed(one["image"]) if name is not None}:
        (path / name).write_bytes(picture(1))
    (path / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def sides(output: Path) -> dict[str, set[str]]:
    """The keys of each split."""
    return {path.parent.name: {s.key for s in samples(path.parent)} for path in output.glob("*/index.jsonl")}


def values(rows: list[dict[str, Any]], field: str, keys: set[str]) -> set[str]:
    """Values of a field of these samples, which may be lists."""
    return {str(value) for one in rows if one["id"] in keys for value in listed(one[field])}


def test_no_image_is_in_two_splits_in_any_order(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for i in range(90):  # of 60 images, some of which are connected by samples with two images
        images = [f"{draw.randrange(60)}.png" for _ in range(draw.choice([1, 1, 1, 1, 2]))]
        rows.append(row(i, images if len(images) > 1 or i % 2 else images[0]))
    pack("jsonl", folder(tmp_path / "in", rows), tmp_path / "out", split="image", test_share=0.3, val_share=0.3)
    found = sides(tmp_path / "out")
    assert sorted(found) == ["test", "train", "val"]
    assert sum(map(len, found.values())) == len(rows)
    images = [values(rows, "image", keys) for keys in found.values()]
    assert sum(map(len, images)) == len(set().union(*images))  # none is counted twice
    assert {s.metadata["split"] for s in samples(tmp_path / "out" / "val")} == {"val"}
    draw.shuffle(rows)
    pack("jsonl", folder(tmp_path / "again", rows), tmp_path / "other", split="image", test_share=0.3, val_share=0.3)
    assert sides(tmp_path / "other") == found


def test_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    rows = [row(i, f"{i % 48}.png", patient=i % 48 // 2, ward=["a", "b"]) for i in range(96)]
    for i in (90, 91):
        rows[i]["patient"] = [str(rows[i]["patient"]), 0]  # joins patients 21 and 0
    rows[5]["patient"], rows[6]["patient"], rows[7]["patient"] = None, float("nan"), ["1", True]
    rows[8]["patient"] = []
    account = pack("jsonl", folder(tmp_path / "in", rows), tmp_path / "out", group_by=["patient"], test_share=0.5)
    found = sides(tmp_path / "out")
    patients = {side: values(rows, "patient", keys) for side, keys in found.items()}
    assert patients["train"].isdisjoint(patients["test"])
    assert min(map(len, patients.values())) >= 6  # of 24, because the hash divides them into two halves of similar size
    assert skipped(account) == {
        "annotations.jsonl line 6": EMPTY,
        "annotations.jsonl line 7": EMPTY,
        "annotations.jsonl line 8": "patient is True, which is not text",
        "annotations.jsonl line 9": EMPTY,
    }


def test_one_file_under_several_names_is_one_image(tmp_path: Path) -> None:
    rows = []
    for i in range(16):
        names = (f"{i}.png", f"./{i}.png", f"../in/{i}.png", f"link{i}.png")
        rows += [row(4 * i + j, name) for j, name in enumerate(names)]
    source = folder(tmp_path / "in", rows)
    for i in range(16):
        (source / f"link{i}.png").unlink()
        (source / f"link{i}.png").symlink_to(f"{i}.png")
    account = pack("jsonl", source, tmp_path / "out", split="image", test_share=0.5)
    assert account.skipped == []
    groups = [{int(key[1:]) // 4 for key in keys} for keys in sides(tmp_path / "out").values()]
    assert sorted(number for group in groups for number in group) == list(range(16))


def test_lines_with_a_split_keep_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row(0, "a.png", split="test"),
        row(1, ["a.png", "b.png"]),
        row(2, "b.png", split=""),
        row(3, "c.png", split="dev"),
        row(4, "c.png", split="test"),
        row(5, "c.png", split=None),
        row(6, None),
    ]
    with caplog.at_level(logging.WARNING):
        account = pack("jsonl", folder(tmp_path / "in", rows), tmp_path / "out", split="image", test_share=0.0)
    assert sides(tmp_path / "out") == {"test": {"q0", "q1", "q2", "q4"}, "dev": {"q3"}, "train": {"q6"}}
    message = "it has no split, and it shares an image or a group with lines of ['dev', 'test']"
    assert skipped(account) == {"annotations.jsonl line 6": message}
    assert "3 of 7 lines have a split and keep it" in caplog.text
    assert "1 images or groups are in several splits" in caplog.text


def test_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", [row(i, f"{i}.png") for i in range(40)])
    pack("jsonl", source, tmp_path / "plain")
    assert sides(tmp_path / "plain").keys() == {"train"}
    words = ["shards", "jsonl", "--input", str(source), "--workers", "1", "--output"]
    assert main([*words, str(tmp_path / "a"), "--split", "image"]) == 0
    test = sides(tmp_path / "a")["test"]
    assert test == {f"q{i}" for i in range(40) if unit_hash(f"{i}.png") < 0.2}
    assert main([*words, str(tmp_path / "b"), "--val-share", "0.5"]) == 0
    found = sides(tmp_path / "b")
    assert found["test"] == test  # the fraction of val does not change test
    assert len(found["val"]) > len(test)
    assert main([*words, str(tmp_path / "c"), "--group-by", "patient"]) == 2
    assert f"first: annotations.jsonl line 1: {EMPTY}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--test-share 0\.7 and --val-share 0\.5 add up to more than 1"):
        pack("jsonl", source, tmp_path / "d", test_share=0.7, val_share=0.5)


def test_groups() -> None:
    groups = Groups()
    for names in (["c", "x"], ["b"], ["y", "x"], ["d", "e"], ["a", "d"], ["e", "b"]):
        groups.add(names)
    assert [groups.name(name) for name in "cxy"] == ["c"] * 3
    assert [groups.name(name) for name in "bdea"] == ["a"] * 4
    names = [str(i) for i in range(2000)]
    chain = Groups()
    for pair in zip(names, names[1:], strict=False):
        chain.add(pair)
    assert {chain.name(name) for name in names} == {"0"}
    sides = [split_by_hash(name, 0.2, 0.1) for name in names]
    # Three standard deviations of 2000 draws with these odds are 54 and 40.
    assert abs(sides.count("test") - 400) < 54
    assert abs(sides.count("val") - 200) < 40


def test_real_data_without_its_split(tmp_path: Path, shared: Path) -> None:
    real, source = shared / "data" / "vqa_rad", tmp_path / "in"
    shutil.copytree(real / "images", source / "images")
    rows = [json.loads(line) for line in (real / "annotations.jsonl").read_text().splitlines()]
    for one in rows:
        del one["split"]
    (source / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    account = pack("jsonl", source, tmp_path / "out", split="image", group_by=["case"])
    assert account.skipped == []
    found = sides(tmp_path / "out")
    images = {side: values(rows, "image", keys) for side, keys in found.items()}
    assert images["train"].isdisjoint(images["test"])
    # Of 253 images a fifth is 51; three standard deviations are 19.
    assert 32 <= len(images["test"]) <= 70


def test_an_empty_split_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = (
        "the split %s is empty: of %d groups (images or cases that stay together), none falls into its fraction of %g"
    )
    name = next(f"{i}.png" for i in range(99) if split_by_hash(f"{i}.png", 0.2) == "train")
    pack("jsonl", folder(tmp_path / "one", [row(0, name), row(1, name)]), tmp_path / "a", split="image")
    assert message % ("test", 1, 0.2) in caplog.text
    caplog.clear()
    rows = [row(i, f"{i}.png") for i in range(3)]
    assert {split_by_hash(one["image"], 0.999) for one in rows} == {"test"}
    pack("jsonl", folder(tmp_path / "three", rows), tmp_path / "b", test_share=0.999)
    assert message % ("train", 3, 0.001) in caplog.text
    caplog.clear()
    rows = [row(0, name), row(1, "other.png", split="test")]  # the line with a split fills it
    pack("jsonl", folder(tmp_path / "named", rows), tmp_path / "c", split="image")
    pack("jsonl", folder(tmp_path / "all", rows[:1]), tmp_path / "d", test_share=1.0)  # train has no share
    assert "is empty" not in caplog.text


@pytest.mark.parametrize(("share", "empty"), [(0.1, "test"), (0.9, "train")])
def test_an_empty_split_of_conversations_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float, empty: str
) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    write_json(tmp_path / "in/all.json", [{"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": turns}])
    for name in "ab":
        write_picture(tmp_path / f"in/{name}.jpg", 1)
    pack("llava", tmp_path / "in", tmp_path / "out", test_share=share)
    assert f"the split {empty} is empty: of 1 groups" in caplog.text
    assert "none falls into its fraction of 0.1" in caplog.text
