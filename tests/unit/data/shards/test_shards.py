"""Samples are read as they were packed; schema violations are refused by name; damage is detected and named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import tarfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medalign.data.samples.sample import REPORT_PROMPT, BadSample, decode_image
from medalign.data.shards import index_file, mapped_table, table_reader
from medalign.data.shards import records as records_module
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.joining import join_shards
from medalign.data.shards.records import KeySet, Picture, Record, Refused, json_bytes
from medalign.data.shards.writer import build_index, write_shards
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.errors import ConfigError, DataError
from tests.unit.data.tiny_data import images, picture, record


def test_round_trip(tmp_path: Path) -> None:
    mask = picture(99)
    report = Record(
        "r1", images(picture(5, 30, 50, "jpg")), {"task": "report", "report": " Clear lungs. ", "case": "7"}
    )
    with_mask = Record("m1", images(picture(1)), {**record(1).fields, "answer_type": "open"}, mask)
    result = write_shards([record(0), report, with_mask], tmp_path / "out", samples_per_shard=2)
    assert (result.written, result.shards, result.refused) == (3, 2, ())

    index = ShardIndex.open(tmp_path / "out")
    assert index.keys == ["s000", "r1", "m1"]
    first, second, third = (index.read(i) for i in range(len(index)))
    assert (first.question, first.answer, first.answer_type) == ("is there a nodule in zone 0 ?", "no", "closed")
    assert first.boxes == ((1.0, 2.0, 9.5, 12.0),)
    assert first.metadata == {"id": "s000", "split": "train", "case": "c0"}
    assert first.shard == "out/shard-000000.tar"
    assert third.shard == "out/shard-000001.tar"
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(Image.open(_bytes(picture(0)))))
    assert (second.question, second.answer, second.task) == (REPORT_PROMPT, "Clear lungs.", "report")
    assert second.images[0].size == (30, 50) == index.size(1)
    assert index.read_mask(0) is None
    read_mask = index.read_mask(2)
    assert read_mask is not None
    assert np.array_equal(np.asarray(read_mask), np.asarray(Image.open(_bytes(mask))))
    assert (index.index_of_key("m1"), index.task(1), index.answer_type(2)) == (2, "report", "open")
    with pytest.raises(DataError, match="'nothing'"):
        index.index_of_key("nothing")


def test_webdataset_reads_the_shards(shards: Path) -> None:
    urls = sorted(str(p) for p in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == ShardIndex.open(shards).keys
    assert json.loads(samples[1]["json"])["answer"] == "yes"
    assert samples[1]["png"] == picture(1)


def test_bytes_depend_only_on_the_records(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards((record(i) for i in range(5)), tmp_path / name, samples_per_shard=2)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["index.jsonl", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


BAD = {
    "image cannot be decoded": Record("x", images(picture(1, kind="jpg")[:-400]), record(1).fields),
    "image cannot be decoded ": Record("x", images(b"no picture"), record(1).fields),
    "named jpg but contains png": Record("x", (Picture(picture(1), "jpg"),), record(1).fields),
    "answer is empty": record(1, answer=""),
    "answer is '  '": record(1, answer="  "),
    "question is empty": record(1, question=""),
    "report is empty": record(1, task="report", report=""),
    "task is 'segment'": record(1, task="segment"),
    "answer_type is 'maybe'": record(1, answer_type="maybe"),
    "is empty; x0 < x1": record(1, boxes=[[5, 5, 5, 9]]),
    "outside the image of 40 x 24": record(1, boxes=[[5, 5, 50, 9]]),
    "box [0.1, 0.2, 0.5, 0.6] is smaller than a pixel; boxes are in pixels, not fractions": record(
        1, boxes=[[0.1, 0.2, 0.5, 0.6]]
    ),
    "box [0, 0, 1, 1] is a single pixel; boxes are in pixels, not fractions": record(1, boxes=[[0, 0, 1, 1]]),
    "box [0, 0.1, 1, 0.9] is a single pixel": record(1, boxes=[[0, 0.1, 1, 0.9]]),
    "box [7.1, 5, 7.9, 5.5] is smaller than a pixel": record(1, boxes=[[7.1, 5, 7.9, 5.5]]),
    "not four numbers": record(1, boxes=[[5, 5, 9]]),
    "not four numbers ": record(1, boxes=[[5, 5, 9, float("nan")]]),
    "key 'a.b'": Record("a.b", images(picture(1)), record(1).fields),
    "key 'a/b'": Record("a/b", images(picture(1)), record(1).fields),
    "occurs a second time": record(0),
    "mask has 5 x 5 pixels, the image 40 x 24": Record("x", images(picture(1)), record(1).fields, picture(1, 5, 5)),
    "mask: image cannot be decoded": Record("x", images(picture(1)), record(1).fields, picture(1)[:200]),
    "mask is jpg": Record("x", images(picture(1)), record(1).fields, picture(1, kind="jpg")),
    "but there is no image": Record("x", (), record(1, boxes=[]).fields, picture(1)),
    "cannot be written as JSON": record(1, extra={1, 2}),
}


@pytest.mark.parametrize("reason", BAD)
def test_refused_by_name(tmp_path: Path, reason: str) -> None:
    bad = BAD[reason]
    result = write_shards([record(0), bad, record(2)], tmp_path / "out")
    assert result.written == 2
    (line,) = result.refused
    assert line.startswith(f"{bad.key}: ")
    assert reason.strip() in line
    assert ShardIndex.open(tmp_path / "out").keys == ["s000", "s002"]


def test_records_refused_by_the_source_are_also_listed(tmp_path: Path) -> None:
    result = write_shards([Refused("line 3", "not JSON"), record(0)], tmp_path / "out")
    assert result.refused == ("line 3: not JSON",)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def broken():
        yield record(0)
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path / "out")
    with pytest.raises(DataError, match=r"no valid sample .*answer is empty"):
        write_shards([record(0, answer="")], tmp_path / "out")
    with pytest.raises(ConfigError, match="samples_per_shard is 0"):
        write_shards([record(0)], tmp_path / "out", samples_per_shard=0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_of_the_same_number_has_left_is_not_touched(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    write_shards([record(0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "out"]


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"out failed, nothing was written: .*File too large"):
            write_shards([record(i) for i in range(40)], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_folder_is_replaced_and_any_other_folder_is_not_touched(tmp_path: Path) -> None:
    write_shards([record(i) for i in range(4)], tmp_path / "out", samples_per_shard=1)
    with pytest.raises(DataError):
        write_shards([], tmp_path / "out")
    assert len(ShardIndex.open(tmp_path / "out")) == 4  # the failed attempt kept the old shards
    write_shards([record(9)], tmp_path / "out")
    assert ShardIndex.open(tmp_path / "out").keys == ["s009"]
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        write_shards([record(9)], tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_progress_counts(tmp_path: Path) -> None:
    seen: list[int] = []
    write_shards([record(i) for i in range(3)], tmp_path / "out", progress=seen.append)
    assert seen == [1, 2, 3]


def test_several_folders_and_pickle(tmp_path: Path, shards: Path) -> None:
    write_shards([record(100)], tmp_path / "more")
    index = ShardIndex.open([shards, str(tmp_path / "more")])
    assert len(index) == 24
    assert index.read(23).shard == "more/shard-000000.tar"
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301  # bytes from the line above
    assert copy.keys == index.keys
    assert copy.read(22).question == index.read(22).question
    assert copy.read(20).images == ()


def test_open_refuses_what_would_fail_later(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ShardIndex.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"no index\.jsonl, but {re.escape(str(shards))} has one;"):
        ShardIndex.open(shards.parent)
    with pytest.raises(DataError, match="no shard folder"):
        ShardIndex.open([])
    second = shards / "shard-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar has .* bytes, the index says"):
        ShardIndex.open(shards)
    second.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        ShardIndex.open(shards)
    second.write_bytes(whole)
    lines = (shards / "index.jsonl").read_text().splitlines()
    for damaged, message in (
        (lines[:-1], "has 22 rows but its header lists 23"),
        ([*lines[:3], lines[3][:20], *lines[4:]], "line 4 is damaged"),
        (["{}", *lines[1:]], "does not begin with an index header"),
        ([lines[0].replace('"version":1', '"version":9'), *lines[1:]], "version 9"),
    ):
        (shards / "index.jsonl").write_text("\n".join(damaged) + "\n")
        with pytest.raises(DataError, match=message):
            ShardIndex.open(shards)
    (shards / "index.jsonl").unlink()
    with pytest.raises(DataError, match=r"no index\.jsonl.*medalign shards index"):
        ShardIndex.open(shards)


def test_bytes_damaged_after_packing(shards: Path) -> None:
    tar = shards / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.find(picture(1)) + 60
    data[at] ^= 0xFF
    tar.write_bytes(bytes(data))
    index = ShardIndex.open(shards)
    with pytest.raises(BadSample, match=r"train/shard-000000\.tar/s001: checksum"):
        index.read(1)
    assert index.read(2).key == "s002"


def test_a_shard_that_vanishes_or_shrinks_is_an_error_of_the_data_set(shards: Path) -> None:
    index = ShardIndex.open(shards, StorageOptions(retries=1, pause=0.01))
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar cannot be read") as caught:
        index.read(15)
    assert not isinstance(caught.value, BadSample)
    (shards / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-000001\.tar cannot be read after 2 tries: it ends before"):
        index.read(8)


def test_index_rebuilt_for_tars_from_other_tools(tmp_path: Path, shards: Path) -> None:
    packed = (shards / "index.jsonl").read_text()
    (shards / "index.jsonl").unlink()
    assert build_index(shards).written == 23
    assert (shards / "index.jsonl").read_text() == packed

    other = tmp_path / "other"
    other.mkdir()
    with webdataset.TarWriter(str(other / "data-7.tar")) as tar:
        tar.write({"__key__": "good", "jpeg": picture(3, kind="jpg"), "json": record(3).fields, "cls": b"4"})
        tar.write({"__key__": "bare", "jpeg": picture(3, kind="jpg")})
        tar.write({"__key__": "cut", "jpeg": picture(3)[:20], "json": record(3).fields})
    result = build_index(other)
    assert result.written == 1
    assert [line.split(":")[0] for line in result.refused] == ["data-7.tar/bare", "data-7.tar/cut"]
    assert ShardIndex.open(other).read(0).images[0].size == (40, 24)
    with pytest.raises(DataError, match=r"no \.tar"):
        build_index(tmp_path)


def members(path: Path, *names: str) -> None:
    """A tar with samples of these keys, and a file that belongs to no sample."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            for ending, data in (("png", picture(number)), ("json", json_bytes(record(number).fields))):
                for member, content in (
                    (f"{name}.{ending}", data),
                    (f"notes/{ending}", b"no sample"),
                    (".hidden", b""),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_keys_with_folders_in_tars_from_other_tools(tmp_path: Path) -> None:
    given = [
        "set/0001",
        "./train/a",
        "set.v1/b",
        "a",
        "other/a",
        "set/0001",
        "../up",
        "/root",
        "a//b",
        "a b/c",
        "a/__b",
    ]
    members(tmp_path / "a.tar", *given)
    members(tmp_path / "b.tar", "set/0002", "train/a", f"{'long/' * 20}x", f"{'longer/' * 40}x")
    result = build_index(tmp_path)
    keys = ["set/0001", "train/a", "set.v1/b", "a", "other/a", "set/0002", f"{'long/' * 20}x"]
    index = ShardIndex.open(tmp_path)
    assert index.keys == keys
    twice, up, *others, again, longer = result.refused
    assert twice == "a.tar/set/0001: key occurs a second time; keys must be unique"
    assert again == "b.tar/train/a: key occurs a second time; keys must be unique"
    assert up.startswith("a.tar/../up: key '../up' must have 1 to 255 bytes, without")
    assert [line.split(": ")[0] for line in others] == [f"a.tar/{key}" for key in ("/root", "a//b", "a b/c", "a/__b")]
    assert longer.startswith("b.tar/longer/")
    urls = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    theirs = [s["__key__"].removeprefix("./") for s in webdataset.WebDataset(urls, shardshuffle=False) if "png" in s]
    assert [key for key in theirs if key in keys] == [
        "set/0001",
        *keys[1:5],
        "set/0001",
        "set/0002",
        *keys[1:2],
        keys[6],
    ]
    assert index.read(index.index_of_key("train/a")).images[0].tobytes() == decode_image(picture(1)).tobytes()


def test_refusals_and_damage_of_keys_in_folders_are_named(tmp_path: Path) -> None:
    members(tmp_path / "a.tar", "set/0001")
    build_index(tmp_path)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[data.find(picture(0)) + 60] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(bytes(data))
    with pytest.raises(BadSample, match=rf"^{tmp_path.name}/a\.tar/set/0001: checksum"):
        ShardIndex.open(tmp_path).read(0)


@given(keys=st.lists(st.text(max_size=3), max_size=60), recent=st.integers(0, 5))
def test_taken_keys(keys: list[str], recent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_RECENT", recent)
        taken, expected = KeySet(), set()
        for key in keys:
            assert (key in taken) == (key in expected)
            taken.add(key)
            expected.add(key)


def test_packing_and_joining_keep_no_rows_in_memory(tmp_path: Path) -> None:
    """Many rows take less memory than a tenth of them would take as dictionaries."""
    count, place = 40_000, [512, 20480, 305419896]
    row = {"task": "vqa", "answer_type": "", "width": 512, "height": 384, "text": [31, 3], "members": {"json": place}}
    part, out = tmp_path / "part", tmp_path / "out"
    part.mkdir()
    (part / "shard-000000.tar").write_bytes(b"")
    tracemalloc.start()
    with index_file.IndexFile(part) as index:
        index.add(part / "shard-000000.tar", ({"key": f"k{i:07d}", "shard": 0, **row} for i in range(count)))
    report = join_shards([part, part], out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.written, report.shards) == (2 * count, 2)
    assert peak < 4_000_000
    header, *rows = (out / "index.jsonl").read_text().splitlines()
    assert json.loads(header)["samples"] == len(rows) == 2 * count
    assert json.loads(rows[-1]) == {"key": f"k{count - 1:07d}", "shard": 1, **row}
    assert sorted(path.name for path in out.iterdir()) == ["index.jsonl", "shard-000000.tar", "shard-000001.tar"]


def test_an_index_that_cannot_be_finished_keeps_the_older_one(shards: Path) -> None:
    before = (shards / "index.jsonl").read_bytes()
    (shards / "shard-000003.tar").write_bytes(b"not a tar at all" * 64)
    with pytest.raises(DataError, match="is not a readable tar"):
        build_index(shards)
    assert (shards / "index.jsonl").read_bytes() == before
    assert len(list(shards.iterdir())) == 5


def test_a_truncated_image_in_a_tar_from_another_tool_is_found_when_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "cut", "jpg": picture(3, 90, 90, "jpg")[:-2000], "json": record(3).fields})
    assert build_index(tmp_path).written == 1  # indexing reads only the header of the image
    with pytest.raises(BadSample, match=r"a\.tar/cut: image cannot be decoded \(image file is truncated"):
        ShardIndex.open(tmp_path).read(0)


def test_deep_gray_becomes_eight_bits(tmp_path: Path) -> None:
    deep = np.linspace(1000, 5000, 40 * 24).reshape(24, 40).astype(np.uint16)
    buffer = _bytes(b"")
    Image.fromarray(deep).save(buffer, "PNG")
    write_shards([Record("d", images(buffer.getvalue()), record(1).fields)], tmp_path / "out")
    image = ShardIndex.open(tmp_path / "out").read(0).images[0]
    assert (image.mode, np.asarray(image).min(), np.asarray(image).max()) == ("L", 0, 255)


def _bytes(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)


def test_an_index_that_does_not_match_its_shards(shards: Path) -> None:
    lines = (shards / "index.jsonl").read_text().splitlines()
    moved = [json.loads(line) for line in lines]
    moved[2]["members"], moved[3]["members"] = moved[3]["members"], moved[2]["members"]
    moved[4]["members"]["png"][2] ^= 1
    del moved[0]["checksum"]  # it would reveal the damage first
    (shards / "index.jsonl").write_text("\n".join(map(json.dumps, moved)) + "\n")
    index = ShardIndex.open(shards)
    with pytest.raises(BadSample, match="s003: checksum"):
        index.read(3)
    for changed, message in (
        ({"shard": 3}, "not in the order of the shards"),
        ({"shard": 9}, "line 3 is damaged"),
        ({"members": {"png": [700, 5, 1]}}, r"line 3 is damaged.*700 is not a multiple of 512"),
    ):
        rows = [json.loads(line) for line in lines]
        rows[2] |= changed
        (shards / "index.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        with pytest.raises(DataError, match=message):
            ShardIndex.open(shards)


def test_a_corrupted_and_a_truncated_tar_from_another_tool(tmp_path: Path, shards: Path) -> None:
    tar = shards / "shard-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(b"not a tar at all" * 64)
    with pytest.raises(DataError, match=r"shard-000001\.tar is not a readable tar"):
        build_index(shards)
    tar.write_bytes(whole[:700])  # within the first member
    with pytest.raises(DataError, match=r"shard-000001\.tar is not a readable tar"):
        build_index(shards)


def test_a_large_index_is_mapped_and_rebuilt_when_the_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_reader, "LARGE", 20)
    monkeypatch.setattr(index_file, "LARGE", 20)
    folder = tmp_path / "large"
    write_shards([record(i) for i in range(30)], folder, samples_per_shard=7)
    assert (folder / "index.bin").is_file()
    index = ShardIndex.open(folder)
    text = table_reader._parse(folder / "index.jsonl")
    mapped = table_reader.read_table(folder)
    assert isinstance(mapped.rows, np.memmap)
    assert np.array_equal(mapped.rows, text.rows)
    assert index.keys == [f"s{i:03d}" for i in range(30)]
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301  # bytes made on this line
    assert len(pickle.dumps(index)) < 2000  # the rows stay in the file
    assert copy.read(29).question == index.read(29).question

    write_shards([record(i) for i in range(40, 65)], folder, samples_per_shard=7)  # index.bin belongs to the shards
    assert ShardIndex.open(folder).keys[0] == "s040"
    (folder / "index.bin").write_bytes(b"cut")
    assert ShardIndex.open(folder).read(3).key == "s043"
    assert mapped_table.TableFile(folder / "index.bin").footer()

    (folder / "index.bin").unlink()
    monkeypatch.setattr(mapped_table.TableFile, "build", _no_space)
    assert ShardIndex.open(folder).key(24) == "s064"
    assert "every process keeps its own copy" in caplog.text


@pytest.mark.parametrize("large", [False, True])
def test_rows_that_do_not_match_the_header_are_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(table_reader, "LARGE", 20)
    path = shards / "index.jsonl"
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"width":40', b'"width":41', 1))
    with pytest.raises(
        DataError, match=r"rows of .*index\.jsonl have the checksum \w{8}, its header lists \w{8}.*delete"
    ):
        ShardIndex.open(shards)
    assert not (shards / "index.bin").exists()
    path.write_bytes(written)
    assert ShardIndex.open(shards).size(1) == (40, 24)
    assert (shards / "index.bin").exists() == large


def test_two_nodes_may_build_the_mapped_table_at_the_same_time(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_reader, "LARGE", 20)
    # The lock of one node is unknown to the other.
    monkeypatch.setattr(table_reader, "file_lock", lambda _: nullcontext())
    pack = mapped_table.pack

    def slow(*arguments):
        monkeypatch.setattr(mapped_table, "pack", pack)
        table_reader.read_table(shards)  # in the meantime, a process of another node with the same id
        return pack(*arguments)

    monkeypatch.setattr(mapped_table, "pack", slow)
    assert isinstance(table_reader.read_table(shards).rows, np.memmap)
    assert not caplog.records
    assert not list(shards.glob(".*"))


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")
