"""LLaVA conversations: each turn becomes a sample."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture


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
        "llava_med_instruct_60k.json entry 2": "conversation does not alternate between human and gpt",
        "llava_med_instruct_60k.json entry 4": "there is no list of conversations",
        "llava_med_instruct_60k-0000003-0": "image 'none.jpg' cannot be read: No such file or directory",
    }


def three_pictures(folder: Path) -> None:
    """a.jpg, b.jpg and c.jpg, 30, 31 and 32 pixels wide."""
    for i, name in enumerate("abc"):
        write_picture(folder / "images" / f"{name}.jpg", i, 30 + i)


def widths(folder: Path) -> dict[tuple[str, int], list[int]]:
    """Widths of the images of each sample, by id of the entry and turn."""
    read = samples(folder)
    return {(s.metadata["id"], s.metadata["turn"]): [image.width for image in s.images] for s in read}


def test_several_images_before_one_question(tmp_path: Path) -> None:
    three_pictures(tmp_path / "in")
    turns = talk("<image>\n<image>\nWhat has changed?", "It grew.", "Where?", "Left.")
    rows = [
        {"id": "tags", "image": ["b.jpg", "a.jpg"], "conversations": turns},
        {"id": "none", "image": ["b.jpg", "c.jpg"], "conversations": talk("What has changed?", "It grew.")},
        {"id": "wrapped", "image": "c.jpg", "conversations": talk("<im_start><image><im_end>\nWhat?", "It.")},
    ]
    write_json(tmp_path / "in" / "all.json", rows)
    pack("llava", tmp_path / "in", tmp_path / "out")
    first, second, untagged, wrapped = samples(tmp_path / "out" / "train")
    assert (first.question, second.question, wrapped.question) == ("What has changed?", "Where?", "What?")
    assert first.metadata["image"] == second.metadata["image"] == ["b.jpg", "a.jpg"]
    assert [[image.width for image in s.images] for s in (first, second, untagged)] == [[31, 30], [31, 30], [31, 32]]


def test_images_are_compared_with_the_tags_of_the_text(tmp_path: Path) -> None:
    three_pictures(tmp_path / "in")
    one, two, none = (talk(f"{tags}What?", "It.") for tags in ("<image>\n", "<image><image>", ""))
    rows = [
        {"image": "a.jpg", "conversations": two},
        {"image": ["a.jpg", "b.jpg", "c.jpg"], "conversations": two},
        {"image": ["a.jpg", "b.jpg"], "conversations": one},
        {"conversations": one},
        {"image": "", "conversations": one},
        {"image": None, "conversations": one},
        {"image": [], "images": None, "conversations": two},
        {"image": float("nan"), "conversations": one},
        {"image": "a.jpg", "images": ["b.jpg"], "conversations": one},
        {"image_path": "a.jpg", "conversations": none},
        {"pictures": ["a.jpg"], "conversations": one},
        {"image": "a.jpg", "conversations": talk("What?", "<image>It.")},
        {"id": "kept", "image": "a.jpg", "images": ["a.jpg"], "conversations": one},
        {"id": "text", "image": "", "conversations": none},
    ]
    write_json(tmp_path / "in" / "all.json", rows)
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert widths(tmp_path / "out" / "train") == {("kept", 0): [30], ("text", 0): []}
    no_image = "<image>, but the sample has no image"
    expected = [
        "the text contains 2 <image>, but the sample has 1 image",
        "the text contains 2 <image>, but the sample has 3 images",
        "the text contains 1 <image>, but the sample has 2 images",
        *[f"the text contains 1 {no_image}"] * 3,
        f"the text contains 2 {no_image}",
        f"the text contains 1 {no_image}",
        '"image" and "images" name different images',
        '\'image_path\' names an image; only "image" and "images" are read',
        '\'pictures\' names an image; only "image" and "images" are read',
        "an answer contains <image>",
    ]
    assert skipped(account) == {f"all.json entry {i}": reason for i, reason in enumerate(expected)}


def test_an_image_belongs_to_its_turn_and_to_later_ones(tmp_path: Path) -> None:
    three_pictures(tmp_path / "in")
    turns = talk("Hello.", "Hello.", "<image>\nWhat?", "It.", "And?", "That.", "<image>\nAnd now?", "Both.")
    write_json(tmp_path / "in" / "all.json", [{"id": "x", "images": ["c.jpg", "a.jpg"], "conversations": turns}])
    pack("llava", tmp_path / "in", tmp_path / "out")
    expected = {("x", 0): [], ("x", 1): [32], ("x", 2): [32], ("x", 3): [32, 30]}
    assert widths(tmp_path / "out" / "train") == expected
    named = [s.metadata["image"] for s in samples(tmp_path / "out" / "train")]
    assert named == [None, ["c.jpg"], ["c.jpg"], ["c.jpg", "a.jpg"]]


TOKENS = """<ImageHere> <|image|> <image1> <image_1> <|image_1|> <IMAGE> <img> </img> <|image_pad|> <im_patch> [IMG]
<image_placeholder> <start_of_image> <|vision_start|> <video> <audio>"""


@pytest.mark.parametrize("token", [*TOKENS.split(), "<image 1>"])
def test_tokens_of_other_models_are_refused(tmp_path: Path, token: str) -> None:
    three_pictures(tmp_path / "in")
    rows = [
        {"image": "a.jpg", "conversations": talk(f"{token}\nWhat?", "It.")},
        {"image": "a.jpg", "conversations": talk("<image>\nIs p<0.05 and a>b [image quality]?", "<3 mm>")},
    ]
    write_json(tmp_path / "in" / "all.json", rows)
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert account.written == 1
    message = f"the text contains {token!r}; write <image> as the placeholder of an image"
    assert skipped(account) == {"all.json entry 0": message}


def test_keys_of_other_tools(tmp_path: Path) -> None:
    three_pictures(tmp_path / "in")
    spoken = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "<image>What?"}]
    typed = [{"type": "image"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "It."}
    rows = [
        {"id": "swift", "messages": [*spoken, answer], "images": ["b.jpg"]},
        {"id": "typed", "messages": [{"role": "user", "content": typed}, answer], "images": "a.jpg"},
        {"id": "misspelt", "conversatons": talk("<image>\nWhat?", "It."), "image": "c.jpg"},
        {
            "id": "sharegpt",
            "conversations": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "It."}],
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}, answer]},
    ]
    write_json(tmp_path / "in" / "all.json", rows)
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    expected = {("swift", 0): [31], ("typed", 0): [30], ("misspelt", 0): [32], ("sharegpt", 0): []}
    assert widths(tmp_path / "out" / "train") == expected
    assert {(s.question, s.answer) for s in samples(tmp_path / "out" / "train")} == {("What?", "It.")}
    message = "content has a part of type 'image', which is not supported; name images in \"image\""
    assert skipped(account) == {"all.json entry 4": message}


def test_names_that_begin_with_images(tmp_path: Path) -> None:
    three_pictures(tmp_path / "in")
    write_picture(tmp_path / "in" / "more" / "d.jpg", 3, 33)
    names = ["images/a.jpg", "b.jpg", "more/d.jpg"]
    turns = talk("What?", "It.")
    rows = [{"id": "all", "image": names, "conversations": turns}, {"image": "images/x.jpg", "conversations": turns}]
    write_json(tmp_path / "in" / "all.json", [*rows, {"image": "../in/all.json", "conversations": turns}])
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert widths(tmp_path / "out" / "train") == {("all", 0): [30, 31, 33]}
    assert skipped(account) == {
        "all-0000001-0": "image 'images/x.jpg' cannot be read: No such file or directory",
        "all-0000002-0": "image '../in/all.json' is outside the folder",
    }


def test_entries_that_share_an_image_stay_together(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = []
    for i in range(24):  # a chain of three images per case, and a single image under another name
        for name in ("a", "b", "c"):
            write_picture(folder / "images" / f"{i}{name}.jpg", i)
        lists = [[f"{i}b.jpg", f"{i}a.jpg"], [f"{i}c.jpg", f"images/{i}b.jpg"], f"./{i}c.jpg"]
        rows += [{"id": str(i), "image": names, "conversations": talk("What?", "It.")} for names in lists]
    write_json(folder / "all.json", rows)
    account = pack("llava", folder, tmp_path / "out", test_share=0.5)
    assert account.skipped == []
    sides = [{s.metadata["id"] for s in samples(tmp_path / "out" / side)} for side in ("train", "test")]
    assert sides[0].isdisjoint(sides[1])
    assert min(map(len, sides)) >= 6  # of 24, because the hash divides them into two halves of similar size


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    three_pictures(tmp_path / "in")
    row = {"id": "1", "image": "a.jpg", "conversations": talk("<image>\nWhat?", "It.")}
    lines = [json.dumps(row), "", json.dumps({**row, "image": None}), "{broken", json.dumps(row)]
    (tmp_path / "in" / name).write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert account.written == 2
    found = skipped(account)
    assert found[f"{name} line 3"] == "the text contains 1 <image>, but the sample has no image"
    assert found[f"{name} line 4"].startswith("not JSON (")


def test_files_are_splits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_picture(folder / "a.png", 1)  # without images/, paths start at the folder
    closed = {"image": "a.png", "answer_type": "CLOSED", "conversations": talk("<image>\nIs it?", "Yes")}
    write_json(folder / "train.json", [closed])
    write_json(folder / "test.json", [closed])
    write_json(folder / "settings.json", [{"lr": 1}])
    with pytest.raises(DataError, match=r"settings\.json contains no conversations; .*--annotations"):
        pack("llava", folder, tmp_path / "out")
    account = pack("llava", folder, tmp_path / "out", annotations=["train.json", "test.json"])
    assert {name: report.written for name, report in account.splits.items()} == {"train": 1, "test": 1}
    assert samples(tmp_path / "out" / "test")[0].answer_type == "closed"


def test_all_files_that_cannot_be_read_are_named_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a", "b", "c", "settings"):
        write_json(folder / f"{name}.json", [{"lr": 1}] if name == "settings" else [ROWS[1]])
    for name in "bc":
        (folder / f"{name}.json").write_bytes((folder / f"{name}.json").read_bytes()[:20])
    with pytest.raises(DataError) as caught:
        pack("llava", folder, tmp_path / "out")
    broken = [line.partition(" cannot be read: not JSON")[0] for line in str(caught.value).splitlines()[:2]]
    assert broken == [str(folder / "b.json"), str(folder / "c.json")]
    assert str(caught.value).splitlines()[2].startswith(f"{folder / 'settings.json'} contains no conversations")
    assert not (tmp_path / "out").exists()


def test_file_names_become_names_of_folders(tmp_path: Path) -> None:
    for name in ("train v1.2", "-test", ".val", "\u80ba" * 50):
        write_json(tmp_path / "in" / f"{name}.json", [ROWS[1]])
    account = pack("llava", tmp_path / "in", tmp_path / "out")
    assert sorted(account.splits) == ["_test", "_val", "train_v1_2", "\u80ba" * 40]
    assert account.skipped == []


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("train v1.json", "train.v1.json", "train_v1"),
        ("train/all.json", "test/all.json", "all"),
        ("a" + "\u80ba" * 14 + ".json", "b" + "\u80ba" * 14 + ".json", "\u80ba" * 13),  # the end of the keys
    ],
)
def test_files_that_would_have_one_name_are_refused(tmp_path: Path, one: str, other: str, name: str) -> None:
    folder = tmp_path / "in"
    for path in (one, other):
        write_json(folder / path, [ROWS[1]])
    message = f"{folder / one} and {folder / other} would both be written as {name!r}; rename one of them"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        pack("llava", folder, tmp_path / "out", annotations=[one, other])


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a \.json file with the conversations"):
        pack("llava", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.json: conversations"):
        pack("llava", tmp_path, tmp_path / "out", annotations=["train.json"])
