"""Annotation files as other tools write them: read, or refused with the reason and the remedy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medalign.data.samples.sample import BadSample
from medalign.datasets.annotations import check_depth, parse_json, read_csv
from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_picture
from tests.unit.datasets.test_odd_values import SOURCES, nested

# For each converter, the file that is damaged after `SOURCES` has written a valid one.
FILES = {
    "vqa-rad": "VQA_RAD Dataset Public.json",
    "omnimedvqa": "QA_information/Open-access/Set.json",
    "slake": "train.json",
    "r2gen": "annotation.json",
    "llava": "train.json",
}
WINDOWS = "Größe".encode("cp1252")


def damaged(name: str, folder: Path, damage: Callable[[bytes], bytes]) -> Path:
    write, good, _, _ = SOURCES[name]
    write(folder, [dict(good)])
    path = folder / FILES[name]
    path.write_bytes(damage(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.decode().encode("utf-16"), "is UTF-16; convert it to UTF-8, for example with iconv"),
        (lambda data: data.decode().encode("utf-16-le"), "is UTF-16; convert"),
        (lambda data: data.decode().encode("utf-16-be"), "is UTF-16; convert"),
        (lambda data: data.decode().encode("utf-32"), "is UTF-32; convert"),
        (gzip.compress, "is gzipped; unpack it with gunzip"),
        (lambda data: data[:-1] + WINDOWS, r"is not UTF-8 \(byte 0xf6 at position \d+\); convert a file from Windows"),
        (lambda data: data[: len(data) // 2], r"cannot be read: not JSON \(.*\); correct it, or download it again"),
        (
            lambda data: b'{"train": ' + b"[" * 9000 + b"]" * 9000 + b"}",
            "cannot be read: lists and objects are nested deeper",
        ),
        (lambda data: b"3", "contains "),
    ],
    ids=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip", "cp1252", "cut", "deep", "number"],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = damaged(name, tmp_path / "in", damage)
    with pytest.raises(DataError, match=rf"^{path} {message}"):
        pack(name, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_files_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    damaged(name, tmp_path / "in", lambda data: b"\xef\xbb\xbf" + data)
    assert pack(name, tmp_path / "in", tmp_path / "out").written == 1


@pytest.mark.parametrize("name", [name for name in FILES if name != "r2gen"])
def test_json_lines_named_json(tmp_path: Path, name: str) -> None:
    def lines(data: bytes) -> bytes:
        (row,) = json.loads(data)
        return "\n".join(["{cut}", json.dumps(row), "[]", json.dumps(row), ""]).encode()

    path = damaged(name, tmp_path / "in", lines)
    account = pack(name, tmp_path / "in", tmp_path / "out")
    assert account.written == 2
    found = skipped(account)
    assert found[f"{path.name} line 1"].startswith("not JSON (Expecting property name")
    assert found[f"{path.name} line 3"] == "it is a JSON list, not an object"


def test_an_object_over_several_lines_is_not_json_lines(tmp_path: Path) -> None:
    path = damaged("llava", tmp_path / "in", lambda data: json.dumps(json.loads(data)[0], indent=1).encode())
    with pytest.raises(DataError, match=f"^{path} contains a JSON dict; it must be a list of samples"):
        pack("llava", tmp_path / "in", tmp_path / "out")


def test_depth_and_digits_are_limited() -> None:
    check_depth(nested(64))
    for value in (nested(65), {"a": nested(64)}, [{"a": nested(63)}]):
        with pytest.raises(BadSample, match="nested deeper than 64 levels"):
            check_depth(value)
    with pytest.raises(BadSample, match="nested deeper than 64 levels"):
        parse_json("[" * 5000)
    assert parse_json("[NaN, -1, Infinity]", nan_is_null=True) == [None, -1, float("inf")]
    assert parse_json("-" + "9" * 5000, nan_is_null=True) == float("-inf")
    with pytest.raises(BadSample, match="^an integer has thousands of digits$"):
        parse_json("9" * 5000)


PLAIN = "id,view,note\n1,PA,x\n2,NaN\n3,,y,z\n"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_cells(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + PLAIN.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    expected = [{"id": "1", "note": "x"}, {"id": "2", "note": ""}, {"id": "3", "note": "y"}]
    assert list(read_csv(tmp_path / name, "id", "note")) == expected
    assert [row["view"] for row in read_csv(tmp_path / name, "view")] == ["PA", "", ""]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", PLAIN.encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("a.csv", gzip.compress(PLAIN.encode(), mtime=0), "is gzipped; unpack it"),
        ("a.csv", PLAIN.encode() + WINDOWS, r"is not UTF-8 \(invalid start byte\); convert a file from Windows"),
        ("a.csv.gz", gzip.compress(PLAIN.encode(), mtime=0)[:-12], r"cannot be read \(.*\); download it again"),
        (
            "a.csv.gz",
            gzip.compress(PLAIN.encode(), mtime=0)[:10] + b"\xff" * 40,
            r"cannot be read \(.*\); download it again",
        ),
        ("a.csv.gz", PLAIN.encode(), r"cannot be read \(Not a gzipped file.*\); download it again"),
        ("a.csv", PLAIN.replace(",", ";").encode(), r"has no column 'id'; its columns are \['id;view;note'\]"),
        ("a.csv", b"", "has no column 'id'; its columns are None"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"^{tmp_path / name} {message}"):
        list(read_csv(tmp_path / name, "id", "note"))


ROW = {"id": "a", "image": "a.jpg", "task": "vqa", "question": "Is it bright?", "answer": "yes"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps([ROW, ROW], indent=1).encode(), "one object per line is required, but this is a JSON list; "),
        (b"\xef\xbb\xbf\n [" + json.dumps(ROW).encode() + b"]", "one object per line is required, but this is a"),
        (json.dumps(ROW).encode("utf-16"), "the file is UTF-16; convert it to UTF-8, for example with iconv -f UTF-16"),
        (gzip.compress(json.dumps(ROW).encode()), "the file is gzipped; unpack it with gunzip"),
        (json.dumps({**ROW, "answer": "ö"}, ensure_ascii=False).encode("cp1252"), "not UTF-8 (byte 0xf6 at position "),
        (json.dumps(ROW, indent=1).encode(), "not JSON (Expecting property name"),
        (json.dumps(ROW).encode()[:-1] + b', "answer": "other"}', "field 'answer' occurs twice in one object"),
    ],
    ids=["list", "list after a mark", "utf-16", "gzip", "cp1252", "several lines", "a field twice"],
)
def test_lines_that_are_not_annotations(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "annotations.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="lists no sample that can be used") as caught:
        pack("jsonl", tmp_path / "in", tmp_path / "out")
    first = json.loads((tmp_path / "out" / "conversion.json").read_text())["skipped_samples"][0]
    assert f"; first: {first['key']}: {message}" in str(caught.value)
    assert first["key"].startswith("annotations.jsonl line ")
    assert "\n" not in str(caught.value)


def test_byte_order_marks_and_deep_lines_among_good_ones(tmp_path: Path) -> None:
    write_picture(tmp_path / "in" / "a.jpg", 1)
    good = json.dumps(ROW)
    lines = [
        "\ufeff" + good,
        "\ufeff" + json.dumps({**ROW, "id": "b"}),
        "[" * 9000,
        good[:-1] + ', "n": %s}' % ("9" * 5000),
    ]
    lines += [json.dumps({**ROW, "id": "c", "x": nested(500)}), json.dumps({**ROW, "id": "d"})]
    (tmp_path / "in" / "annotations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    account = pack("jsonl", tmp_path / "in", tmp_path / "out")
    assert [s.key for s in samples(tmp_path / "out" / "train")] == ["a", "b", "d"]
    found = skipped(account)
    assert found.keys() == {"annotations.jsonl line 3", "annotations.jsonl line 4", "c"}
    assert found["annotations.jsonl line 3"] == found["c"] == "lists and objects are nested deeper than 64 levels"
    assert found["annotations.jsonl line 4"] == "an integer has thousands of digits"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "data",
    [
        (json.dumps(ROW, indent=1) + "\n" + json.dumps({**ROW, "list": ["a"]}, indent=1)).encode(),
        "\r".join([json.dumps(ROW), json.dumps({**ROW, "id": "b"})]).encode(),
        b"id,image,task\na,a.jpg,vqa\nb,a.jpg,vqa\n",
    ],
    ids=["pretty", "cr", "csv"],
)
def test_a_file_without_objects_has_a_remedy(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "annotations.jsonl").write_bytes(data)
    remedy = r"one object per line is required: .* jq -c .* tr .* CSV"
    with pytest.raises(DataError, match=rf"\(1 x not JSON; first: .* line 1: not JSON .*; .* {remedy}"):
        pack("jsonl", tmp_path / "in", tmp_path / "out")


def test_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    message = "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    path = damaged("llava", tmp_path / "list", lambda _: POINTER)
    with pytest.raises(DataError, match=f"^{path} is {message}$"):
        pack("llava", tmp_path / "list", tmp_path / "out")
    lines = tmp_path / "in" / "annotations.jsonl"
    lines.parent.mkdir()
    lines.write_text(json.dumps(ROW))
    (tmp_path / "in" / "a.jpg").write_bytes(POINTER)
    with pytest.raises(DataError, match=f"first: a: image is {message}"):
        pack("jsonl", tmp_path / "in", tmp_path / "out")
    lines.write_bytes(POINTER)
    with pytest.raises(DataError, match=f"line 1: the file is {message}"):
        pack("jsonl", tmp_path / "in", tmp_path / "out")


def test_a_list_in_an_object_has_a_remedy(tmp_path: Path) -> None:
    path = damaged("llava", tmp_path / "in", lambda data: b'{"info": 1, "data": ' + data + b"}")
    message = (
        f"{path} contains a JSON dict; it must be a list of samples, such as the one under 'data': extract it with jq "
    )
    with pytest.raises(DataError) as caught:
        pack("llava", tmp_path / "in", tmp_path / "out")
    assert str(caught.value) == f"""{message}'.["data"]'"""
