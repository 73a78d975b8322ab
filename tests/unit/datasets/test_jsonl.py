"""A folder with annotations and images becomes shards per split; errors are reported with their line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medalign.data.batches.collator import Collator
from medalign.data.shards.index import ShardIndex
from medalign.errors import DataError
from medalign.geometry import PreprocessCfg
from tests.unit.data.tiny_data import batches, picture
from tests.unit.data.tiny_text import encoder
from tests.unit.datasets.conversion import pack, samples, skipped

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def row(i: int, **changes: object) -> dict[str, object]:
    return {
        "id": f"q{i}",
        "image": f"images/{i}.jpg",
        "task": "vqa",
        "question": "clear ?",
        "answer": "yes",
        "answer_type": "closed",
        "split": "train" if i % 3 else "test",
    } | changes


def folder(path: Path, *rows: object) -> Path:
    (path / "images").mkdir(parents=True)
    for i in range(6):
        (path / "images" / f"{i}.jpg").write_bytes(picture(i, kind="jpg"))
    (path / "mask.png").write_bytes(picture(0))
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (path / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_each_split_becomes_a_shard_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", *(row(i) for i in range(5)), "", row(5, split="", image=None))
    account = pack("jsonl", source, tmp_path / "out")
    assert {name: (r.written, r.shards) for name, r in account.splits.items()} == {"test": (2, 1), "train": (4, 1)}
    assert account.skipped == []
    assert ShardIndex.open(tmp_path / "out" / "test").keys == ["q0", "q3"]
    train = samples(tmp_path / "out" / "train")
    assert [sample.key for sample in train] == ["q1", "q2", "q4", "q5"]
    assert train[0].metadata == {"id": "q1", "image": "images/1.jpg", "split": "train"}
    assert train[3].images == ()


def test_masks_are_packed(tmp_path: Path) -> None:
    pack("jsonl", folder(tmp_path / "in", row(1, mask="mask.png")), tmp_path / "out")
    mask = ShardIndex.open(tmp_path / "out" / "train").read_mask(0)
    assert mask is not None
    assert mask.size == (40, 24)


def test_a_list_of_images_is_one_sample(tmp_path: Path) -> None:
    three = [f"images/{i}.jpg" for i in (2, 0, 1)]
    source = folder(
        tmp_path / "in",
        row(1, image=three, boxes=[[1, 2, 9, 12]], mask="mask.png"),
        row(2, image=three[:1]),
        row(4, image=[]),
        row(5, image=[*three[:2], "images/none.jpg"]),
        row(7, image=three * 30),
        row(8, image=[*three, None]),
    )
    for i in range(6):
        (source / "images" / f"{i}.jpg").write_bytes(picture(i, 40 + i, 24, "jpg"))
    (source / "mask.png").write_bytes(picture(0, 42, 24))
    account = pack("jsonl", source, tmp_path / "out")
    several, one, none = samples(tmp_path / "out" / "train")
    assert [image.width for image in several.images] == [42, 40, 41]
    assert several.metadata["image"] == three
    assert several.boxes == ((1, 2, 9, 12),)
    assert ([image.width for image in one.images], none.images) == ([42], ())
    assert skipped(account) == {
        "q5": "image 3 of 3: image 'images/none.jpg' cannot be read: No such file or directory",
        "q7": "image names 90 files; at most 64 are read",
        "q8": "image 4 of 4: image is None; it must be a path relative to the folder",
    }
    assert "image ... of ... image ... cannot be read" in account.reasons()


def test_bad_lines_are_named(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in",
        row(1),
        "{broken",
        "[1, 2]",
        row(2, id="none", image="images/none.jpg"),
        row(4, id="dicom", image="annotations.jsonl"),
        row(5, id="out", image="../secret.png"),
        row(5, id=7),
        {k: v for k, v in row(5, id="no-image").items() if k != "image"},
        row(5, id="no-mask", mask="nowhere.png"),
        row(5, id="lone-mask", mask="mask.png", image=None),
        row(5, split="../../up"),
        row(5, id="empty", answer=""),
        row(1),
        row(0),
    )
    account = pack("jsonl", source, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 1, "test": 1}
    expected = {
        "annotations.jsonl line 2": "not JSON",
        "annotations.jsonl line 3": "it is a JSON list",
        "none": "image 'images/none.jpg' cannot be read: No such file",
        "dicom": "image cannot be decoded",
        "out": "image '../secret.png' is outside",
        "annotations.jsonl line 7": "id is 7",
        "no-image": "no image is named",
        "no-mask": "mask 'nowhere.png' cannot be read",
        "lone-mask": "a mask is given, but there is no image",
        "annotations.jsonl line 11": "split is '../../up'",
        "empty": "answer is empty",
        "q1": "key occurs a second time",
    }
    found = skipped(account)
    assert found.keys() == expected.keys()
    assert all(found[key].startswith(start) for key, start in expected.items()), found


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr", "RGBX"])
def test_colors_that_png_does_not_have_become_rgb(tmp_path: Path, mode: str) -> None:
    source = folder(tmp_path / "in", row(1, image="a.tiff"), row(2))
    Image.linear_gradient("L").resize((40, 24)).convert("RGB").convert(mode if mode != "LAB" else "RGB").save(
        source / "a.tiff"
    )
    if mode == "LAB":
        values = np.full((24, 40, 3), 128, np.uint8)
        Image.fromarray(values, "LAB").save(source / "a.tiff")
    account = pack("jsonl", source, tmp_path / "out")
    assert account.skipped == []
    image = samples(tmp_path / "out" / "train")[0].images[0]
    assert (image.mode, image.size) == ("RGB", (40, 24))


def test_an_image_that_cannot_be_written_refuses_only_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "in", row(1, image="a.bmp"), row(2))
    Image.new("L", (40, 24)).save(source / "a.bmp")

    def fail(*_: object) -> None:
        raise OSError("encoder error -2")

    monkeypatch.setattr(Image.Image, "save", fail)
    account = pack("jsonl", source, tmp_path / "out")
    assert skipped(account) == {"q1": "image of mode L cannot be written as PNG (encoder error -2)"}


@pytest.mark.parametrize(
    "split", [".train", "a b", "a/b", "a.joined", "-x", " ", "lock\0", "a\n", "\ud800", 0, ["a"], "x" * 201]
)
def test_splits_that_are_not_folder_names_are_refused(tmp_path: Path, split: object) -> None:
    account = pack("jsonl", folder(tmp_path / "in", row(1), row(2, split=split)), tmp_path / "out")
    ((place, reason),) = skipped(account).items()
    assert place == "annotations.jsonl line 2"
    assert reason.startswith(f"split is {split!r}; it names a folder")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conversion.json", "train"]


def test_a_split_may_be_named_as_the_conversions_own_files(tmp_path: Path) -> None:
    rows = (row(1, split="lock"), row(2, split="fingerprint"), row(4, split="été-2"), row(5, split=None))
    account = pack("jsonl", folder(tmp_path / "in", *rows), tmp_path / "out")
    assert sorted(account.splits) == ["fingerprint", "lock", "train", "été-2"]


def test_names_that_are_not_valid_for_a_file(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in",
        row(1),
        row(2, image="images/\0.png"),
        row(4, mask="\0"),
        row(5, image="images/\ud800.png"),
        row(5, id="\ud800"),
        row(8, image="loop/a.png"),
    )
    (source / "loop").symlink_to("loop")
    account = pack("jsonl", source, tmp_path / "out")
    assert account.written == 1
    found = skipped(account)
    assert found["q2"] == "image 'images/\\x00.png' cannot be read: embedded null byte"
    assert found["q4"] == "mask '\\x00' cannot be read: embedded null byte"
    assert "cannot be read" in found["q5"] and "cannot be read" in found["q8"]
    assert found["\ud800"].startswith("key '\\ud800' must have")


def test_answer_types_in_capitals(tmp_path: Path) -> None:
    rows = (row(1, answer_type="CLOSED"), row(2, answer_type=" Open "), row(4, answer_type=None), row(5, answer_type=3))
    account = pack("jsonl", folder(tmp_path / "in", *rows), tmp_path / "out")
    assert [sample.answer_type for sample in samples(tmp_path / "out" / "train")] == ["closed", "open", ""]
    assert skipped(account) == {"q5": "answer_type is 3; it must be 'closed', 'open' or ''"}


def test_folder_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks\n  annotations\.jsonl: one JSON object per line"):
        pack("jsonl", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_is_read_like_image_and_tags_are_counted(tmp_path: Path) -> None:
    two = ["images/2.jpg", "images/0.jpg"]
    plain = row(1)
    del plain["image"]
    source = folder(
        tmp_path / "in",
        {**plain, "id": "several", "images": two},
        row(1, id="null-beside", image=None, images="images/2.jpg"),
        row(1, id="tag", question="<image>\nIs it <3 mm?"),
        row(1, id="tags", image=two, question="<image>\n<image>\nclear ?"),
        row(1, id="report", task="report", report="Clear.", question="<image>"),
        row(1, id="differ", images=two),
        row(1, id="too-many", question="<image><image> clear ?"),
        row(1, id="without", image=None, question="<image> clear ?"),
        row(1, id="answer", answer="<image>"),
        row(1, id="other", question="<|image_1|> clear ?"),
        {**plain, "id": "neither"},
        row(1, id="empty", images=""),
    )
    account = pack("jsonl", source, tmp_path / "out")
    read = {s.key: s for s in samples(tmp_path / "out" / "train")}
    counts = {"several": 2, "null-beside": 1, "tag": 1, "tags": 2, "report": 1}
    assert {key: len(s.images) for key, s in read.items()} == counts
    assert (read["tag"].question, read["tags"].question) == ("Is it <3 mm?", "clear ?")
    assert skipped(account) == {
        "differ": '"image" and "images" name different images',
        "too-many": "the text contains 2 <image>, but the sample has 1 image",
        "without": "the text contains 1 <image>, but the sample has no image",
        "answer": "the answer contains <image>",
        "other": "the text contains '<|image_1|>'; write <image> as the placeholder of an image",
        "neither": "no image is named; write null for a question without an image",
        "empty": "images is ''; write a path, or null for a question without an image",
    }


@pytest.mark.parametrize(
    ("name", "counts", "boxes"),
    [("vqa_rad", {"train": 1467, "test": 330}, 0), ("covid_chestxray", {"train": 92, "test": 19}, 45)],
)
def test_real_data(tmp_path: Path, name: str, counts: dict[str, int], boxes: int) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real data set {name} is not beside the repository ({REAL})")
    account = pack("jsonl", REAL / name, tmp_path)
    assert {split: report.written for split, report in account.splits.items()} == counts
    assert account.skipped == []
    index = ShardIndex.open([tmp_path / split for split in counts])
    shown = [index.read(i) for i in range(0, len(index), 7)]
    assert all(s.images[0].size == index.size(7 * i) for i, s in enumerate(shown))
    assert any(s.images[0].width != s.images[0].height for s in shown)
    if name == "covid_chestxray":
        assert sum(bool(index.read(i).boxes) for i in range(len(index))) == boxes
    view = PreprocessCfg(12, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    reader = Collator(encoder(), view, view, padding_side="left", with_answer=False)
    read = list(batches(index, reader, 4, range(12)))
    assert sum(len(batch.keys) for _, batch in read) == 12
