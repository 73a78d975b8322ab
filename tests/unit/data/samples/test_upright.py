"""EXIF orientation is applied once: pixels, header, index, boxes and masks all refer to the upright image."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from medalign.data.samples.decode import decode_image, decode_mask, picture_header
from medalign.data.samples.sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.data.shards.writer import build_index, write_shards
from tests.unit.data.tiny_data import images, record

# What the eight orientations of EXIF 2.3 (tag 0x0112) make of stored rows and columns.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: stored.T[:, ::-1],
    7: lambda stored: stored.T[::-1, ::-1],
    8: lambda stored: stored.T[::-1],
}
WAYS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, LZW": {"compression": "tiff_lzw"},
    "JPEG": {"quality": 100},
}


def ramps(width: int = 96, height: int = 48) -> np.ndarray:
    """A gray image that differs in all eight orientations."""
    y, x = np.mgrid[:height, :width]
    return (x * 160 // width + y * 90 // height).astype(np.uint8)


def encode(values: np.ndarray, way: str, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    image, buffer = Image.fromarray(values), io.BytesIO()
    image.save(buffer, way.split(",")[0], exif=exif, **WAYS[way])
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("way", WAYS)
def test_pixels_and_header_are_upright(way: str, orientation: int) -> None:
    data = encode(ramps(), way, orientation)
    image = decode_image(data)
    wanted = UPRIGHT[orientation](ramps()).astype(int)
    found = np.asarray(image.convert("L")).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= (2 if way == "JPEG" else 0)  # levels, of JPEG's own rounding
    assert picture_header(data)[1:] == image.size == decode_mask(data).size


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_may_store_its_orientation_after_its_pixels() -> None:
    plain = encode(ramps(), "PNG")
    end = plain.rindex(b"IEND") - 4
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = plain[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:]
    assert decode_image(data).size == (48, 96)
    assert picture_header(data) == ("png", 48, 96)


def test_the_orientation_may_be_in_xmp_only() -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    for way, name in {"TIFF": "tif", "WEBP": "webp"}.items():
        image, buffer = Image.fromarray(ramps()), io.BytesIO()
        image.save(buffer, way, **({"tiffinfo": {700: packet}} if way == "TIFF" else {"xmp": packet}))
        assert decode_image(buffer.getvalue()).size == (48, 96)
        assert picture_header(buffer.getvalue()) == (name, 48, 96)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0"]
)
def test_unreadable_exif_data_is_ignored(exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramps()).save(buffer, "JPEG", exif=b"Exif\0\0" + exif)
    assert decode_image(buffer.getvalue()).size == (96, 48)
    assert picture_header(buffer.getvalue()) == ("jpg", 96, 48)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_invalid_orientations_are_ignored(orientation: int) -> None:
    assert decode_image(encode(ramps(), "JPEG", orientation)).size == (96, 48)


def test_a_film_decoded_at_reduced_scale_is_upright_with_its_boxes(tmp_path: Path) -> None:
    data = encode(ramps(1600, 1200), "JPEG", 6)
    fields = record(1, boxes=[[160, 120, 800, 1600]]).fields  # inside 1200 x 1600, outside as stored
    write_shards([Record("j", images(data), fields)], tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert index.size(0) == (1200, 1600)
    assert index.read(0).boxes == ((160, 120, 800, 1600),)
    small = index.read(0, at_least=336)
    assert small.images[0].size == (300, 400)
    assert small.boxes == ((40, 30, 200, 400),)


def test_masks_and_boxes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    photo, mask = encode(ramps(), "JPEG", 6), encode(np.eye(96, 48, dtype=np.uint8), "PNG")
    fields = record(1, boxes=[[10, 60, 30, 90]]).fields
    turned = encode(np.eye(96, 48, dtype=np.uint8).T[:, ::-1], "PNG", 8)  # the same when upright
    records = [Record("a", images(photo), fields, mask), Record("b", images(photo), fields, turned)]
    as_stored = encode(np.eye(48, 96, dtype=np.uint8), "PNG")
    report = write_shards([*records, Record("c", images(photo), fields, as_stored)], tmp_path / "out")
    assert report.refused == ("c: mask has 96 x 48 pixels, the image 48 x 96",)
    index = ShardIndex.open(tmp_path / "out")
    for i in range(2):
        read = index.read_mask(i)
        assert read is not None
        assert np.array_equal(np.asarray(read), np.eye(96, 48))
    assert build_index(tmp_path / "out").written == 2
    assert ShardIndex.open(tmp_path / "out").size(0) == (48, 96)


def test_an_index_with_sizes_before_rotation_is_refused(tmp_path: Path) -> None:
    photo = encode(ramps(), "JPEG", 6)
    write_shards([Record("a", images(photo), record(1, boxes=[]).fields)], tmp_path / "out")
    path = tmp_path / "out" / "index.jsonl"
    header, row = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    del header["checksum"]
    row["width"], row["height"] = 96, 48  # as written by a version that ignored orientation
    path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n", encoding="utf-8")
    for at_least in (0, 12):
        with pytest.raises(BadSample, match=r"the index lists 96 x 48; rebuild it with `medalign shards index DIR`"):
            ShardIndex.open(tmp_path / "out").read(0, at_least)
    build_index(tmp_path / "out")
    assert ShardIndex.open(tmp_path / "out").read(0).images[0].size == (48, 96)
