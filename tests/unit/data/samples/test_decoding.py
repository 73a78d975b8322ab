"""Images as a radiologist sees them: reduced decoding of large images, deep gray, DICOM without names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from medalign.data.samples import dicom
from medalign.data.samples.decode import decode_image, picture_header
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.data.shards.writer import build_index, write_shards
from medalign.datasets import files
from tests.unit.data.dicom_files import study
from tests.unit.data.tiny_data import images, record


def smooth(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.rint(127 + 60 * np.sin(x / width * 9) + 60 * np.cos(y / height * 7)).astype(np.uint8)


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(width, height)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "at_least", "decoded"),
    [((1600, 1200), 336, (400, 300)), ((1600, 1200), 900, (1600, 1200)), ((1600, 1200), 0, (1600, 1200))],
)
def test_a_film_far_larger_than_needed_is_decoded_at_reduced_scale(size, at_least, decoded) -> None:
    image = decode_image(jpeg(*size), at_least)
    assert image.size == decoded
    small = np.asarray(image.resize((84, 63)), dtype=float)
    whole = np.asarray(Image.fromarray(smooth(*size)).resize((84, 63)), dtype=float)
    assert np.abs(small - whole).max() < 4  # gray levels: the error of JPEG, and two ways to reduce a smooth image


def test_boxes_are_scaled_with_the_image(tmp_path: Path) -> None:
    fields = record(1, boxes=[[160, 120, 800, 600]]).fields
    write_shards([Record("j", images(jpeg(1600, 1200)), fields)], tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert index.read(0).boxes == ((160, 120, 800, 600),)
    small = index.read(0, at_least=336)
    assert small.images[0].size == (400, 300)
    assert small.boxes == ((40, 30, 200, 150),)


def test_deep_gray_is_windowed_without_outliers() -> None:
    deep = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)
    deep[0, 0] = 65_535  # a burned-in marker, as scanners write it
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    gray = np.asarray(decode_image(buffer.getvalue()))
    assert (gray[0, 0], gray.min(), gray.max()) == (255, 0, 255)
    assert abs(int(gray[50, 0]) - 127) <= 2  # the middle of the window, not 4 % of the range
    rare = np.zeros((100, 100), np.uint16)
    rare[3, 3] = 900
    buffer = io.BytesIO()
    Image.fromarray(rare).save(buffer, "PNG")
    assert np.asarray(decode_image(buffer.getvalue()))[3, 3] == 255


RAMP = np.tile(np.arange(0, 4000, 40), (20, 1))


def test_dicom_is_displayed_with_its_window() -> None:
    plain = np.asarray(dicom.decode(study(RAMP)))
    assert (plain[0, 0], plain[0, -1]) == (0, 255)
    windowed = np.asarray(dicom.decode(study(RAMP, WindowCenter=1000, WindowWidth=1000)))[0]
    assert (windowed[:13] == 0).all() and (windowed[38:] == 255).all()  # 500 and below, 1500 and above
    assert abs(int(windowed[25]) - 128) <= 1
    inverted = np.asarray(dicom.decode(study(RAMP, PhotometricInterpretation="MONOCHROME1")))
    assert np.array_equal(inverted, 255 - plain)
    hounsfield = study(RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[1000, 50], WindowWidth=[2000, 9])
    assert abs(int(np.asarray(dicom.decode(hounsfield))[0, 25]) - 128) <= 1  # 2 x 1000 - 1000


def test_dicom_in_a_tar_is_read_without_its_names(tmp_path: Path) -> None:
    data = study(RAMP)
    assert picture_header(data) == ("dcm", 100, 20)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "d", "dcm": data, "json": record(3, boxes=[]).fields})
    assert build_index(tmp_path).written == 1
    sample = ShardIndex.open(tmp_path).read(0)
    assert (sample.images[0].size, sample.images[0].mode, sample.images[0].info) == ((100, 20), "L", {})
    png = files.png(dicom.decode(data))
    assert b"secret" not in png and b"Doe" not in png
    assert np.array_equal(np.asarray(decode_image(png)), np.asarray(sample.images[0]))
