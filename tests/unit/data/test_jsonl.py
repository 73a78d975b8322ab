"""A folder of annotations and pictures becomes shards, split by split; what is wrong is named with its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_data import picture
from tiny_text import encoder

from medalign.data.collate import Collator, TowerView
from medalign.data.index import ShardIndex
from medalign.data.loader import batches
from medalign.data.shards import Record, Refused
from medalign.data.sources.jsonl import pack, records, splits
from medalign.errors import DataError
from medalign.geometry import PatchGrid

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
    seen: list[int] = []
    reports = pack(source, tmp_path / "out", samples_per_shard=2, progress=seen.append)
    assert {name: (r.written, r.shards, r.refused) for name, r in reports.items()} == {
        "test": (2, 1, ()),
        "train": (4, 2, ()),
    }
    assert seen == [1, 2, 1, 2, 3, 4]
    assert ShardIndex.open(tmp_path / "out" / "test").keys == ["q0", "q3"]
    train = ShardIndex.open(tmp_path / "out" / "train")
    assert train.keys == ["q1", "q2", "q4", "q5"]
    assert train.read(0).metadata == {"id": "q1", "image": "images/1.jpg", "split": "train"}
    assert train.read(3).images == ()
    assert splits(source) == {"test": 2, "train": 4}


def test_masks_are_packed(tmp_path: Path) -> None:
    pack(folder(tmp_path / "in", row(1, mask="mask.png")), tmp_path / "out")
    mask = ShardIndex.open(tmp_path / "out" / "train").read_mask(0)
    assert mask is not None
    assert mask.size == (40, 24)


def test_bad_lines_are_named_with_their_number(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in",
        row(1),
        "{broken",
        "[1, 2]",
        row(2, image="images/none.jpg"),
        row(4, image="scan.dcm"),
        row(5, image="../secret.png"),
        row(5, id=7),
        {k: v for k, v in row(5).items() if k != "image"},
        row(5, mask="nowhere.png"),
        row(5, mask="mask.png", image=None),
        row(5, split="../../up"),
        row(5, answer=""),
        row(0),
    )
    reports = pack(source, tmp_path / "out")
    train, test = reports["train"], reports["test"]
    assert (train.written, test.written, test.refused) == (1, 1, ())
    expected = [
        "annotations.jsonl line 2: not JSON",
        "annotations.jsonl line 3: a JSON list",
        "annotations.jsonl line 4 (q2): image images/none.jpg cannot be read: No such file",
        "annotations.jsonl line 5 (q4): image is 'scan.dcm'",
        "annotations.jsonl line 6 (q5): image ../secret.png lies outside",
        "annotations.jsonl line 7 (7): id is 7",
        "annotations.jsonl line 8 (q5): no image is named",
        "annotations.jsonl line 9 (q5): mask nowhere.png cannot be read",
        "q5: a mask is given, but there is no image",
        "annotations.jsonl line 11: split is '../../up'",
        "q5: answer is empty",
    ]
    assert len(train.refused) == len(expected)
    assert all(line.startswith(start) for line, start in zip(train.refused, expected, strict=True)), train.refused
    kinds = Counter(type(r) for r in records(source, None))
    assert kinds == {Record: 4, Refused: 9}  # the empty answer and the lone mask are found by the packer


def test_folder_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations\.jsonl does not exist"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no readable line"):
        pack(folder(tmp_path / "in", "{"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "counts", "boxes"),
    [("vqa_rad", {"train": 1467, "test": 330}, 0), ("covid_chestxray", {"train": 92, "test": 19}, 45)],
)
def test_real_data(tmp_path: Path, name: str, counts: dict[str, int], boxes: int) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real data set {name} is not beside the repository ({REAL})")
    reports = pack(REAL / name, tmp_path, samples_per_shard=500)
    assert {split: (r.written, r.refused) for split, r in reports.items()} == {s: (n, ()) for s, n in counts.items()}
    index = ShardIndex.open([tmp_path / split for split in counts])
    samples = [index.read(i) for i in range(0, len(index), 7)]
    assert all(s.images[0].size == index.size(7 * i) for i, s in enumerate(samples))
    assert any(s.images[0].width != s.images[0].height for s in samples)
    with_boxes = sum(
        bool(record.fields["boxes"]) for record in records(REAL / name, None) if isinstance(record, Record)
    )
    assert with_boxes == boxes
    view = TowerView(12, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    reader = Collator(encoder(), view, view, PatchGrid(3, 3), padding_side="left", with_answer=False)
    shown = list(batches(index, reader, 4, range(12)))
    assert sum(len(batch.keys) for _, batch in shown) == 12
