"""Samples with several images, from the tar to the batch: order, names, missing and broken images."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medalign.data.order.mixture import LengthGroupedOrder
from medalign.data.order.order import GlobalOrder
from medalign.data.samples.sample import BadSample
from medalign.data.shards import index_file, listing, table, table_reader
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.listing import IMAGE, JSON, MASK
from medalign.data.shards.members import MAX_IMAGES, image_member, image_members
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import build_index, write_shards
from tests.unit.data.batches.test_loader import collator
from tests.unit.data.tiny_data import batches, images, picture, record

Encoded = tuple[bytes, ...]


def several(key: str, *encoded: bytes, mask: bytes | None = None, **changes: object) -> Record:
    boxes = {} if encoded else {"boxes": []}
    return Record(key, images(*encoded), record(1, **boxes, **changes).fields, mask)


def films(count: int, seed: int = 0) -> Encoded:
    """Images of different sizes and both formats."""
    return tuple(picture(seed + i, 40 + i, 24 + 2 * i, "jpg" if i % 2 else "png") for i in range(count))


def pack(folder: Path, *records: Record) -> ShardIndex:
    assert write_shards(records, folder, samples_per_shard=2).refused == ()
    return ShardIndex.open(folder)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def tar_of(folder: Path, **members: object) -> Path:
    """A tar from another tool with one sample named "a"."""
    folder.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        tar.write({"__key__": "a", "json": record(1).fields} | {k.replace("_", "."): v for k, v in members.items()})
    return folder


def test_round_trip(tmp_path: Path) -> None:
    given_images = {"none": (), "one": films(1), "three": films(3, 5), "many": films(12, 20)}
    mask = picture(9)
    records = [several(key, *encoded, mask=mask if key == "three" else None) for key, encoded in given_images.items()]
    index = pack(tmp_path / "out", *records)
    assert index.max_images == 12
    for i, encoded in enumerate(given_images.values()):
        sample = index.read(i)
        assert [pixels(image).tolist() for image in sample.images] == [
            pixels(Image.open(io.BytesIO(data))).tolist() for data in encoded
        ]
        assert index.size(i) == (sample.images[0].size if encoded else (0, 0))
    assert index.read(2).boxes == ((1.0, 2.0, 9.5, 12.0),)
    assert [index.read_mask(i) is None for i in range(4)] == [True, True, False, True]
    # Other tools find the members under names that they can decode.
    found = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000001.tar"), shardshuffle=False).decode("pil"))
    assert {"png", "1.jpg", "2.png", "json", "mask.png"} < set(found[0])
    assert found[0]["1.jpg"].size == (41, 26)


def test_the_row_of_a_sample_with_one_image_is_unchanged(tmp_path: Path) -> None:
    pack(tmp_path, record(1))
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        members = {info.name.partition(".")[2]: info for info in tar}
    data = {"png": picture(1), "json": json.dumps(record(1).fields, sort_keys=True).encode()}
    places = {name: [members[name].offset_data, len(data[name]), zlib.crc32(data[name])] for name in data}
    row = {"key": "s001", "shard": 0, "task": "vqa", "answer_type": "closed", "width": 40, "height": 24}
    row |= {"text": [len("is there a nodule in zone 1 ?"), len("yes")], "members": places}
    assert (tmp_path / "index.jsonl").read_text().splitlines()[1] == json.dumps(row, separators=(",", ":"))


def test_each_image_is_decoded_at_its_own_reduced_scale(tmp_path: Path) -> None:
    index = pack(tmp_path, several("a", picture(0, 1600, 1200, "jpg"), picture(1, 800, 900, "jpg"), picture(2)))
    sample = index.read(0, at_least=336)
    assert [image.size for image in sample.images] == [(400, 300), (400, 450), (40, 24)]
    assert sample.boxes == ((0.25, 0.5, 2.375, 3.0),)  # in pixels of the first


def test_tars_from_other_tools(tmp_path: Path) -> None:
    first, second = films(2)
    folder = tar_of(tmp_path / "theirs", **{"0_png": first, "01_JPG": second, "cls": b"4"})
    assert build_index(folder).written == 1
    index = ShardIndex.open(folder)
    assert [image.size for image in index.read(0).images] == [(40, 24), (41, 26)]
    assert index.max_images == 2


NUMBERS = {
    "image number 1 is missing; found png, 2.png": {"png": 0, "2_png": 2},
    "image number 0, 2 is missing; found 1.jpg, 3.jpg": {"1_jpg": 1, "3_jpg": 3},
    "image number 0 occurs twice (0.png, png)": {"0_png": 0, "png": 0},
    "image number 1 occurs twice (1.jpg, 1.png)": {"1_jpg": 1, "1_png": 0, "png": 0},
    "image number 64 is too high; at most 64 images are read": {"png": 0, "64_png": 2},
}


@pytest.mark.parametrize("reason", NUMBERS)
def test_wrong_numbers_are_named(tmp_path: Path, reason: str) -> None:
    folder = tar_of(tmp_path, **{name: films(4)[i] for name, i in NUMBERS[reason].items()})
    (line,) = build_index(folder).refused
    assert line.startswith(f"a.tar/a: {reason}")


def test_names_of_members() -> None:
    names = [image_member(number, "jpg") for number in range(MAX_IMAGES)]
    assert names[:3] == ["jpg", "1.jpg", "2.jpg"]
    assert image_members([*sorted(names), "json", "mask.png", "left.jpg", "1.2.jpg", "-1.jpg"]) == names


BROKEN = {
    "image 2 of 3: image cannot be decoded": images(*films(1), picture(1, kind="jpg")[:-400], *films(1)),
    "image 3 of 3: image is named png but contains jpg": (*images(*films(2)), Picture(picture(1, kind="jpg"), "png")),
    "there are 65 images; at most 64 are read": images(*films(1) * 65),
    "box [1.0, 2.0, 9.5, 12.0] is outside the image of 8 x 8 pixels": images(picture(1, 8, 8), *films(1)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_images_are_refused_by_name(tmp_path: Path, reason: str) -> None:
    result = write_shards([record(0), Record("x", BROKEN[reason], record(1).fields)], tmp_path / "out")
    (line,) = result.refused
    assert line.startswith(f"x: {reason}")
    assert ShardIndex.open(tmp_path / "out").keys == ["s000"]


def test_broken_images_in_tars_from_other_tools(tmp_path: Path) -> None:
    cut = picture(3, 90, 90, "jpg")
    (line,) = build_index(tar_of(tmp_path / "a", png=picture(1), **{"1_jpg": cut[:20]})).refused
    assert line.startswith("a.tar/a: image 2 of 2: image cannot be decoded")
    folder = tar_of(tmp_path / "b", png=picture(1), **{"1_jpg": cut[:-2000], "2_png": picture(2)})
    assert build_index(folder).written == 1  # indexing reads only the headers
    with pytest.raises(BadSample, match=r"^b/a\.tar/a: image 2 of 3: image cannot be decoded \(image file is trunc"):
        ShardIndex.open(folder).read(0)


def test_bytes_damaged_after_packing(tmp_path: Path) -> None:
    encoded = films(3)
    index = pack(tmp_path / "out", several("a", *encoded))
    tar = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.find(encoded[1]) + 60] ^= 0xFF
    tar.write_bytes(bytes(data))
    with pytest.raises(BadSample, match=r"^out/shard-000000\.tar/a: image 2 of 3: checksum differs"):
        index.read(0)


def fake_row(number: int, count: int, draw: np.random.Generator) -> dict:
    """A row of the text index for a sample with this number of images, with members in any order."""

    def place() -> list[int]:
        return [512 * int(draw.integers(1, 1 << 32)), *draw.integers(1, 1 << 32, 2).tolist()]

    names = [image_member(i, str(draw.choice(["jpg", "png", "dcm"]))) for i in range(count)]
    names += ["json"] + ["mask.png"] * (number % 3 == 0)
    row = {"key": f"k{number}", "shard": 0, "task": "vqa", "answer_type": "", "width": 1, "height": 1}
    return row | {"text": [1, 1], "members": {str(name): place() for name in draw.permutation(names)}}


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 5) | st.just(MAX_IMAGES), min_size=1, max_size=30), chunk=st.integers(1, 9))
def test_the_table_equals_the_text(tmp_path_factory: pytest.TempPathFactory, counts: list[int], chunk: int) -> None:
    folder = tmp_path_factory.mktemp("index")
    rows = [fake_row(number, count, np.random.default_rng(number)) for number, count in enumerate(counts)]
    header = {"format": "medalign-index", "version": 1, "samples": len(rows)}
    header["shards"] = [{"name": "shard-000000.tar", "bytes": 1, "samples": len(rows)}]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_reader, "LARGE", 1)
        patch.setattr(listing, "_CHUNK", chunk)
        tables = [table_reader._parse(folder / "index.jsonl"), table_reader.read_table(folder)]
    assert isinstance(tables[1].rows, np.memmap)
    for one in tables:
        assert one.images(np.arange(len(rows))).tolist() == counts
        assert one.max_images == max(1, *counts)
        for number, row in enumerate(rows):
            names = {IMAGE: image_members(row["members"]), JSON: ["json"], MASK: ["mask.png"]}
            wanted = [(kind, *row["members"][name]) for kind in names for name in names[kind] if name in row["members"]]
            assert one.members(number, (IMAGE, JSON, MASK)) == wanted


def test_damaged_rows(tmp_path: Path) -> None:
    pack(tmp_path, several("a", *films(3)))
    header, line = (tmp_path / "index.jsonl").read_text().splitlines()
    row = json.loads(line)
    for changed, message in (
        ({"1.jpg": None}, r"line 2 is damaged.*image number 1 is missing"),
        ({"json": None}, r"line 2 is damaged.*'json'"),
        ({"wav": [512, 1, 1]}, r"line 2 is damaged.*wav are of an unknown kind"),
        ({"2.png": [700, 1, 1]}, r"line 2 is damaged.*700 is not a multiple of 512"),
    ):
        members = {name: place for name, place in (row["members"] | changed).items() if place}
        (tmp_path / "index.jsonl").write_text(f"{header}\n{json.dumps(row | {'members': members})}\n")
        with pytest.raises(table_reader.DataError, match=message):
            ShardIndex.open(tmp_path)


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardIndex:
    """Nine samples with 0, 1 and 2 images in turn, and their index mapped from its file."""
    monkeypatch.setattr(table_reader, "LARGE", 3)
    monkeypatch.setattr(index_file, "LARGE", 3)
    return pack(tmp_path / "mapped", *(several(f"k{i}", *films(i % 3, i)) for i in range(9)))


def _read_in_a_child(index: ShardIndex) -> None:
    assert [len(index.read(i).images) for i in range(9)] == [0, 1, 2] * 3


def test_a_mapped_table_is_pickled_and_forked(mapped: ShardIndex) -> None:
    assert isinstance(mapped._tables[0].further, np.memmap)
    assert len(pickle.dumps(mapped)) < 2000  # the arrays stay in their file
    _read_in_a_child(pickle.loads(pickle.dumps(mapped)))  # noqa: S301  # bytes made on this line
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=_read_in_a_child, args=(mapped,))
        child.start()
        child.join()
        assert child.exitcode == 0


def test_the_file_of_an_earlier_version_is_rebuilt(mapped: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "mapped" / "index.bin"
    now = path.read_bytes()
    path.write_bytes(now.replace(b"table-2\n", b"table-1\n"))
    assert len(ShardIndex.open(tmp_path / "mapped").read(8).images) == 2
    assert path.read_bytes() == now


def test_neighbors_share_a_read_and_nothing_else_is_read(mapped: ShardIndex) -> None:
    from medalign.data.shards.index import _spans

    assert [len(_spans(mapped._members(i, (IMAGE, JSON)))) for i in range(9)] == [1] * 9
    assert _spans([table.MemberRange(IMAGE, 1 << 20, 9, 0), table.MemberRange(JSON, 512, 9, 0)]) == [
        (512, 9),
        (1 << 20, 9),
    ]


def test_samples_are_grouped_by_their_images_then_by_their_text(tmp_path: Path) -> None:
    samples = (("d", 2, "short"), ("c", 1, "long " * 99), ("f", 3, "x"), ("a", 0, "x"), ("b", 1, "x"))
    write_shards([several(key, *films(n), question=question) for key, n, question in samples], tmp_path / "a")
    write_shards([several("e", *films(2), question="a long one " * 9)], tmp_path / "b")
    index = ShardIndex.open([tmp_path / "a", tmp_path / "b"])
    lengths = index.lengths(np.arange(6))
    assert [index.key(i) for i in np.argsort(lengths)] == list("abcdef")
    assert (lengths >> 32).tolist() == [2, 1, 3, 0, 1, 2]
    grouped = LengthGroupedOrder(GlobalOrder(6, 0), index.lengths, global_batch=2, groups=3, seed=0).indices_at(
        np.arange(6)
    )
    assert sorted("".join(sorted(index.key(i) for i in pair)) for pair in grouped.reshape(3, 2)) == ["ab", "cd", "ef"]


def test_a_batch_of_none_to_three_images(tmp_path: Path) -> None:
    wide, tall, square = (picture(i, *size) for i, size in enumerate([(30, 10), (10, 30), (12, 12)]))
    boxless = {"boxes": []}
    records = [
        several("zero"),
        several("one", wide, **boxless),
        several("two", tall, wide, **boxless),
        several("three", square, tall, wide, **boxless),
    ]
    ((samples, batch),) = batches(pack(tmp_path, *records), collator(), 4)
    assert [len(sample.images) for sample in samples] == [0, 1, 2, 3]
    assert batch.image_sample.tolist() == [1, 2, 2, 3, 3, 3]
    assert batch.image_weight.tolist() == [1] * 6
    assert batch.student_pixels.shape == (6, 3, 12, 12)
    assert batch.teacher_pixels.shape == (6, 3, 16, 16)
    # Nine tokens per image. Images are numbered through the batch; the tokens of an image are together and in order.
    for row, mine in enumerate(([], [0], [1, 2], [3, 4, 5])):
        found = batch.image_index[row]
        assert found[found >= 0].tolist() == [number for number in mine for _ in range(9)]
    assert not batch.question_mask[0].any()
    after_images = (batch.image_index >= 0).long().cumsum(1) == (batch.image_index >= 0).sum(1, keepdim=True)
    assert not (batch.question_mask & ~after_images).any()
    # A 30 x 10 image covers the middle row of the 3 x 3 patches, 10 x 30 the middle column, and 12 x 12 all of them.
    row, column, whole = [0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 0] * 3, [1] * 9
    assert batch.patch_valid.long().tolist() == [row, column, row, whole, column, row]
