"""Tars from other tools: members are read or refused by name, and no sample silently loses its image."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medalign.__main__ import main
from medalign.data.samples.sample import decode_image
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.index_file import IndexFile
from medalign.data.shards.writer import build_index
from medalign.errors import DataError
from tests.unit.data.foreign_tars import ANNOTATION, FILM, file, hard_link, indexed, sample, symbolic_link, write
from tests.unit.data.tiny_data import picture


@pytest.mark.parametrize("ending", ["png", "PNG", "jpg", "Jpeg", "jpe", "jfif", "0.jpg"])
def test_extensions_of_images(tmp_path: Path, ending: str) -> None:
    report, images = indexed(write(tmp_path / "a.tar", *sample("a", ending)))
    assert (images, report.refused, report.ignored) == ({"a": 1}, (), ())


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM"])
def test_further_formats_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    ending = {"TIFF": "tif", "JPEG2000": "jp2"}.get(kind, kind.lower())
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "film", kind)
    film = (tmp_path / "film").read_bytes()
    folder = write(tmp_path / "tars/a.tar", file(f"a.{ending}", film), file("a.json", ANNOTATION), *sample("b"))
    report, images = indexed(folder)
    if report.refused:
        assert report.refused[0].startswith("a.tar/a: image ")
        assert images == {"b": 1}
    else:
        assert images == {"a": 1, "b": 1}


UNKNOWN = ["input.jpg", "img.png", "image.jpg", "left.jpg", "heic", "svg", "nii.gz", "npy", "foo", "1.2.jpg", "seg.png"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_members_with_unknown_names_are_refused(tmp_path: Path, name: str) -> None:
    unknown = [file(f"a.{name}", FILM), file("a.json", ANNOTATION)]
    report, images = indexed(write(tmp_path / "a.tar", *unknown, *sample("b")))
    assert images == {"b": 1}
    (line,) = report.refused
    assert line.startswith(f"a.tar/a: member a.{name} is not a supported image; name it jpg, png or dcm")


def test_known_companions_are_counted_once_per_tar(tmp_path: Path) -> None:
    beside = [file(f"a.{name}", b"1") for name in ("txt", "cls", "png.json", "features.npy", "txt2.txt")]
    text_only = [file("b.json", ANNOTATION), file("b.txt", b"1")]
    report, images = indexed(write(tmp_path / "a.tar", *sample("a"), *beside, *text_only))
    assert (images, report.refused) == ({"a": 1, "b": 0}, ())
    assert report.ignored == ("a.tar: members with these endings are not read: 3 x txt, 1 x cls, 1 x json, 1 x npy",)


def test_links_inside_the_tar_are_followed(tmp_path: Path) -> None:
    members = [
        *sample("set/0000", seed=3),
        hard_link("set/0001.png", "set/0000.png"),
        file("set/0001.json", ANNOTATION),
        symbolic_link("set/0002.png", "../other/./0001.png"),  # forward, and to a link
        hard_link("set/0002.json", "./set/0001.json"),
        symbolic_link("other/0001.png", "../blobs/3fa9"),
        hard_link("other/0001.json", "set/0000.json"),
        file("blobs/3fa9", picture(5)),
    ]
    report, images = indexed(write(tmp_path / "a.tar", *members))
    assert images == {"set/0000": 1, "set/0001": 1, "set/0002": 1, "other/0001": 1}
    assert report.refused == ()
    index = ShardIndex.open(tmp_path)
    shown = [index.read(i).images[0].tobytes() for i in range(4)]
    assert shown == [decode_image(picture(seed)).tobytes() for seed in (3, 3, 5, 5)]


LINKS = {
    "is a link to b.png, which is not in the tar": [symbolic_link("a.png", "b.png")],
    "is a link to ../up.png, which is not in the tar": [symbolic_link("a.png", "../up.png")],
    "is a link to /data/a.png, which is not in the tar": [symbolic_link("a.png", "/data/a.png")],
    "is a link that leads back to itself through x": [symbolic_link("a.png", "x"), symbolic_link("x", "a.png")],
    "is a link that leads back to itself through ": [symbolic_link("a.png", "./a.png")],
    "is a link to x, which occurs twice in the tar": [hard_link("a.png", "x"), file("x", FILM), file("x", FILM)],
}


@pytest.mark.parametrize("reason", LINKS)
def test_links_without_a_target(tmp_path: Path, reason: str) -> None:
    report, images = indexed(write(tmp_path / "a.tar", *LINKS[reason], file("a.json", ANNOTATION), *sample("z")))
    assert images == {"z": 1}
    (line,) = report.refused
    assert line.startswith(f"a.tar/a: member a.png {reason}")


NO_FILES = {
    "is a FIFO, not a file": {"type": tarfile.FIFOTYPE},
    "is a device, not a file": {"type": tarfile.CHRTYPE},
    "is a sparse file": {"type": tarfile.GNUTYPE_SPARSE},
    "has 0 bytes": {"type": tarfile.REGTYPE},
}


@pytest.mark.parametrize("reason", NO_FILES)
def test_members_without_bytes(tmp_path: Path, reason: str) -> None:
    members = [file("a.png", **NO_FILES[reason]), file("a.json", ANNOTATION), *sample("b")]
    report, images = indexed(write(tmp_path / "a.tar", *members, format=tarfile.GNU_FORMAT))
    assert images == {"b": 1}
    assert report.refused[0].startswith(f"a.tar/a: member a.png {reason}")


def test_members_of_a_sample_may_be_anywhere_in_the_tar(tmp_path: Path) -> None:
    sorted_ones = [member for i in range(5) for member in sample(f"k{i}", seed=i)]
    for name, order in {"kinds": (*range(0, 10, 2), *range(1, 10, 2)), "mixed": (1, 3, 0, 2, 5, 7, 9, 8, 6, 4)}.items():
        report, images = indexed(write(tmp_path / name / "a.tar", *[sorted_ones[i] for i in order]))
        assert report.refused == ()
        assert images == {f"k{i}": 1 for i in range(5)}
        index = ShardIndex.open(tmp_path / name)
        for i in range(5):
            shown = index.read(index.index_of_key(f"k{i}")).images[0]
            assert shown.tobytes() == decode_image(picture(i)).tobytes()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_further_headers(tmp_path: Path, format: int) -> None:
    key = f"{'long/' * 40}ü"
    report, images = indexed(write(tmp_path / "a.tar", *sample(key), format=format, pax_headers={"comment": "x" * 600}))
    assert (images, report.refused) == ({key: 1}, ())


def test_a_key_that_occurs_twice(tmp_path: Path) -> None:
    whole, more = [*sample("a", seed=1), *sample("a", seed=2)], sample("b")
    report, images = indexed(write(tmp_path / "whole/a.tar", *whole, *more))
    assert images == {"a": 1, "b": 1}
    assert report.refused == ("a.tar/a: key occurs a second time; keys must be unique",)
    assert ShardIndex.open(tmp_path / "whole").read(0).images[0].tobytes() == decode_image(picture(1)).tobytes()
    open_pairs = [
        [whole[0], whole[2], whole[1]],  # two images, one annotation
        [
            whole[0],
            more[0],
            whole[2],
            whole[1],
            more[1],
            whole[3],
        ],  # sorted by kind: it is ambiguous which annotation belongs to which image
        [
            whole[1],
            more[0],
            whole[0],
            more[1],
            whole[3],
        ],  # without its image, the annotation would be a question without an image
    ]
    for number, members in enumerate(open_pairs):
        report, images = indexed(write(tmp_path / f"{number}/a.tar", *members, *sample("c")))
        assert "a" not in images
        assert any(line.startswith("a.tar/a: member ") and "twice in the tar" in line for line in report.refused)


APART = {
    "images/0000.png": ["images/0000.png", "labels/0000.json"],
    "0000_left.png": ["0000_left.png", "0000.json"],
    "film.0000.png": ["film.0000.png", "text.json"],
    "IM0001": ["IM0001", "IM0001.json"],
    "arrays/0000.npy": ["arrays/0000.npy", "labels/0000.json"],
    "images/0000": ["images/0000", "labels/0000.json"],
}


@pytest.mark.parametrize("image", APART)
def test_images_that_lost_their_annotation(tmp_path: Path, image: str) -> None:
    names = APART[image]
    members = [file(name, FILM if name == image else ANNOTATION) for name in names]
    report, images = indexed(write(tmp_path / "a.tar", *members, *sample("z")))
    assert images == {"z": 1}
    key = names[1].removesuffix(".json")
    expected = f"a.tar/{key}: it has no image, and {image} in the same tar has no annotation"
    assert any(line.startswith(expected) for line in report.refused)


@pytest.mark.parametrize("names", [("images", "labels"), ("texts", "films")])
def test_images_and_annotations_in_separate_tars(tmp_path: Path, names: tuple[str, str]) -> None:
    contents = {
        "images": ("png", FILM),
        "films": ("png", FILM),
        "labels": ("json", ANNOTATION),
        "texts": ("json", ANNOTATION),
    }
    for name in names:
        ending, data = contents[name]
        write(tmp_path / f"{name}-0.tar", *[file(f"k{i}.{ending}", data) for i in range(3)])
    with pytest.raises(DataError, match=r"-0\.tar: the members of k0 are split between this tar and an earlier one"):
        build_index(tmp_path)


def test_files_that_belong_to_no_sample_are_counted(tmp_path: Path) -> None:
    members = [*sample("a"), file("README"), file("set/LICENSE"), file("._a.png"), file("b.json", ANNOTATION)]
    report, images = indexed(write(tmp_path / "a.tar", *members))
    assert images == {"a": 1, "b": 0}
    assert report.ignored == ("a.tar: 3 files without a name and an ending are not read; the first is README",)


def test_dots_in_names(tmp_path: Path) -> None:
    uids = [member for i in range(3) for member in sample(f"1.2.840.113619.2.{i}")]
    report, images = indexed(write(tmp_path / "a.tar", *uids, *sample("good"), *sample("scan.v2")))
    assert images == {"good": 1}
    (line,) = report.refused
    assert line.startswith(
        "a.tar: 8 files are not used because their names contain dots, for example 1.2.840.113619.2.0.png: a key ends "
        "at the first dot of the name"
    )
    assert "replace the dots" in line


def test_a_number_after_a_dot_is_not_an_image_of_another_sample(tmp_path: Path) -> None:
    report, images = indexed(write(tmp_path / "a.tar", *sample("1"), *sample("1.1"), *sample("b")))
    assert images == {"b": 1}
    assert report.refused[0].startswith("a.tar: 4 files are not used")


def test_dots_in_names_without_annotation(tmp_path: Path) -> None:
    report, _ = indexed(write(tmp_path / "a.tar", file("1.2.7.png", FILM), file("1.2.8.png", FILM)))
    expected = "a.tar/1: there is no 1.json for its other members (2.7.png, 2.8.png; a key ends at the first dot"
    assert report.refused[0].startswith(expected)


def test_concatenated_archives(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"part/{i}.tar", *sample(f"k{2 * i}", seed=2 * i), *sample(f"k{2 * i + 1}", seed=2 * i + 1))
    parts = [(tmp_path / f"part/{i}.tar").read_bytes() for i in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    report, images = indexed(tmp_path)
    assert images == {f"k{i}": 1 for i in range(6)}
    begins = [len(parts[0]), len(parts[0]) + len(parts[1])]
    assert [line.split(": ", 1)[1].split(",")[0] for line in report.ignored] == [
        f"another archive begins at byte {byte}" for byte in begins
    ]
    index = ShardIndex.open(tmp_path)
    assert [index.read(i).images[0].tobytes() for i in range(6)] == [
        decode_image(picture(i)).tobytes() for i in range(6)
    ]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A tar with three samples."""
    write(tmp_path / "whole/a.tar", *[member for i in range(3) for member in sample(f"k{i}")])
    return (tmp_path / "whole/a.tar").read_bytes()


def said_of(folder: Path, data: bytes) -> str:
    """The error message for a tar with these bytes."""
    (folder / "a.tar").write_bytes(data)
    with pytest.raises(DataError) as caught:
        build_index(folder)
    assert not (folder / "index.jsonl").exists()
    return str(caught.value)


def test_damaged_tars(tmp_path: Path, whole: bytes) -> None:
    with tarfile.open(tmp_path / "whole/a.tar") as tar:
        members = tar.getmembers()
    second, last = members[2].offset, members[-1]
    end = last.offset_data + 512 * -(-last.size // 512)
    size = len(whole)

    lost = whole[:second] + bytes(1024) + whole[second + 1024 :]
    assert f"there are 1024 bytes of zeros and then {size - second - 1024} bytes" in said_of(tmp_path, lost)
    overwritten = whole[:second] + b"x" * 512 + whole[second + 512 :]
    assert f"there are {size - second} bytes that belong to no member" in said_of(tmp_path, overwritten)
    assert f"{size - end} bytes of zeros and then 7 bytes" in said_of(tmp_path, whole + b"garbage")
    joined = whole[: end + 512] + whole  # no archive begins here, because tars are padded to full records
    assert f"there are 512 bytes of zeros and then {size} bytes" in said_of(tmp_path, joined)

    between = said_of(tmp_path, whole[:end])
    assert f"a.tar ends at byte {end} without the blocks of zeros that end a tar" in between
    assert "truncate -s +1024 a.tar" in between
    cut = said_of(tmp_path, whole[: last.offset_data + 5])
    assert f"it has {last.offset_data + 5} bytes, and k2.json ends at byte {last.offset_data + last.size}" in cut
    assert "a.tar is not a readable tar (empty file)" in said_of(tmp_path, b"")
    for byte in range(last.offset + 1, last.offset_data, 100):  # within the last header
        assert "a.tar is damaged" in said_of(tmp_path, whole[:byte])


def test_a_short_but_complete_end(tmp_path: Path, whole: bytes) -> None:
    with tarfile.open(tmp_path / "whole/a.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512 * -(-last.size // 512)
    for more in (512, 1024, 1500):
        (tmp_path / "a.tar").write_bytes(whole[: end + more])
        assert indexed(tmp_path)[1] == {"k0": 1, "k1": 1, "k2": 1}


def test_a_header_with_a_negative_size_causes_no_endless_loop(tmp_path: Path) -> None:
    info, _ = file("a.png")
    info.size = -1024
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert "is not a readable tar" in said_of(tmp_path, header + bytes(10240 - 512))


COMPRESSED = {
    "gzip-compressed; .*`mv a.tar a.tar.gz && gunzip a.tar.gz`": gzip.compress,
    "xz-compressed; .*`mv a.tar a.tar.xz && unxz a.tar.xz`": lzma.compress,
    "bzip2-compressed; .*`mv a.tar a.tar.bz2 && bunzip2 a.tar.bz2`": bz2.compress,
    "zstd-compressed; .*unzstd": lambda data: b"\x28\xb5\x2f\xfd" + data,
    "lz4-compressed; .*unlz4": lambda data: b"\x04\x22\x4d\x18" + data,
    "a Git LFS pointer; .*`git lfs pull`": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a web page; the download needs a login": lambda _: b"<!DOCTYPE html>\n<html>",
    "a zip archive; unzip it": lambda data: b"PK\x03\x04" + data,
}


@pytest.mark.parametrize("remedy", COMPRESSED)
def test_files_named_tar_that_are_not_tars(tmp_path: Path, whole: bytes, remedy: str) -> None:
    (tmp_path / "a.tar").write_bytes(COMPRESSED[remedy](whole))
    with pytest.raises(DataError, match=rf"a\.tar is {remedy}"):
        build_index(tmp_path)


def test_folders_without_tars_are_described(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(DataError) as caught:
            build_index(tmp_path / "f")
        return str(caught.value).removeprefix(str(tmp_path / "f "))

    assert said() == "does not exist; correct the path"
    (tmp_path / "f/train").mkdir(parents=True)
    (tmp_path / "f/train/a.tar").touch()
    assert said() == "contains no .tar file, but its subfolders train do: name them instead"
    for name in ("a.tar.gz", "b.tar.gz", "c.TAR", "d.tgz", "e.zip"):
        (tmp_path / "f" / name).touch()
    for part in (
        "2 files *.tar.gz, for example a.tar.gz: shards are read by byte ranges, so decompress with gunzip",
        "c.TAR: rename to .tar",
        "d.tgz: shards are read by byte ranges, so decompress with gunzip",
        "e.zip: unzip",
    ):
        assert part in said()
    (tmp_path / "f/0.tar").write_bytes(b"")
    write(tmp_path / "f/0.tar", *sample("a"))
    assert any("not read: c.TAR: rename" in line for line in indexed(tmp_path / "f")[0].ignored)


def test_a_broken_link_to_a_tar_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", *sample("a"))
    (tmp_path / "b.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=r"b\.tar is a folder or a broken link"):
        build_index(tmp_path)


def test_an_index_without_a_sample_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "bad/a.tar", file("a.png", FILM))
    write(tmp_path / "good/a.tar", *sample("a"))
    assert main(["shards", "index", str(tmp_path / "good"), str(tmp_path / "bad")]) == 2
    assert [path.name for path in sorted(tmp_path.glob("*/index.jsonl"))] == ["index.jsonl"]
    assert (tmp_path / "good/index.jsonl").is_file()
    with IndexFile(tmp_path / "bad"):
        pass  # as written by an older version
    with pytest.raises(DataError, match=r"shard folder .*bad contains no sample"):
        ShardIndex.open([tmp_path / "good", tmp_path / "bad"])


def test_samples_without_an_image_are_counted_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = [file(f"t{i}.json", ANNOTATION) for i in range(3)]
    for name, members in {"all": sample("a"), "some": [*sample("a"), *text], "none": text}.items():
        write(tmp_path / name / "a.tar", *members)
        assert main(["shards", "index", str(tmp_path / name)]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'all'}: 1 samples in 1 shards, all with images" in said
    assert f"{tmp_path / 'some'}: 4 samples in 1 shards; 1 with images, 3 without" in said
    assert f"{tmp_path / 'none'}: 3 samples in 1 shards; none with images, 3 without" in said


def test_many_refused_samples_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [file(f"k{i:03d}.png", FILM) for i in range(30)]
    write(tmp_path / "a.tar", *bare, *sample("a"))
    assert main(["shards", "index", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("refused: a.tar/k") for line in lines) == 20
    assert any(line.startswith("30 x refused: there is no") for line in lines)
