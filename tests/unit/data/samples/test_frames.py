"""The first frame of a stack, a cine loop or an animation is used, and such images are counted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit

from medalign.__main__ import main
from medalign.data.samples.decode import SEVERAL_FRAMES, decode_image, has_several_frames, picture_header
from medalign.data.shards.index import ShardIndex
from medalign.errors import MedAlignError
from medalign.inference import generate
from tests.unit.data.dicom_files import compressed, file_of, jpeg, study
from tests.unit.data.tiny_data import picture, record

FILMS = [np.full((24, 40), level, np.uint8) for level in (10, 120, 240)]


def stack(kind: str) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(film) for film in FILMS)
    first.save(buffer, kind, save_all=True, append_images=rest)
    return buffer.getvalue()


LOOP = study(FILMS[0], NumberOfFrames=3, PixelData=np.stack(FILMS).astype(np.uint16).tobytes())


def row(key: str, image: object) -> str:
    return json.dumps({"id": key, "image": image, "task": "vqa", "question": "clear ?", "answer": "yes"})


@pytest.mark.parametrize("workers", ["1", "2"])
def test_packing_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    files = {"a.tif": stack("TIFF"), "b.gif": stack("GIF"), "c.dcm": LOOP, "d.png": picture(0), "e.png": stack("PNG")}
    for name, data in files.items():
        (source / name).write_bytes(data)
    rows = [row(name[0], name) for name in files] + [row("pair", ["a.tif", "d.png", "e.png"])]
    (source / "annotations.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = [
        "--input",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--samples-per-shard",
        "2",
        "--workers",
        workers,
    ]
    assert main(["shards", "jsonl", *words]) == 0
    message = f"{SEVERAL_FRAMES}: 6 times"
    assert [line for line in capsys.readouterr().err.splitlines() if "frames" in line] == [message]
    report = json.loads((tmp_path / "out" / "conversion.json").read_text(encoding="utf-8"))
    assert report["notes"] == {SEVERAL_FRAMES: 6}
    index = ShardIndex.open(tmp_path / "out" / "train")
    for i in (0, 1, 4):
        assert (np.asarray(index.read(i).images[0].convert("L")) == 10).all()


def jpegs(count: int) -> bytes:
    pixels = np.dstack(FILMS)
    return file_of(compressed([jpeg(pixels)] * count, pixels, JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL"))


def raw(films: list[np.ndarray], **tags: object) -> bytes:
    return study(films[0], PixelData=np.stack(films).astype(np.uint16).tobytes(), **tags)


ODD = [np.full((3, 5), level, np.uint8) for level in (10, 120)]  # 15 bytes each, without padding between them
BYTES = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}


@pytest.mark.parametrize(
    ("data", "several"),
    [
        (raw(FILMS), True),
        (raw(FILMS[:2], NumberOfFrames=1), True),
        (raw(FILMS[:1]), False),
        (study(ODD[0], PixelData=np.stack(ODD).tobytes(), **BYTES), True),
        (study(ODD[0], PixelData=ODD[0].tobytes() + b"\0", **BYTES), False),
        (study(ODD[0][:1, :1], PixelData=b"\1\0", **BYTES), False),
        (jpegs(3), True),
        (jpegs(1), False),
    ],
)
def test_frames_that_no_tag_counts(data: bytes, several: bool) -> None:
    assert has_several_frames(data) == several
    assert decode_image(data).size == picture_header(data)[1:]


def test_indexing_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for key, member in {"a": {"dcm": LOOP}, "b": {"png": picture(1)}, "c": {"png": stack("PNG")}}.items():
            tar.write({"__key__": key, "json": record(1, boxes=[]).fields, **member})
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert f"{SEVERAL_FRAMES}: 2 times" in capsys.readouterr().err
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "b", "json": record(1, boxes=[]).fields, "png": picture(1)})
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert "frames" not in capsys.readouterr().err


def test_answering_also_reports_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "film.tif").write_bytes(stack("TIFF"))
    with pytest.raises(MedAlignError):  # there is no run, but images are read before any model
        generate(tmp_path / "none", [tmp_path / "film.tif"], "clear ?")
    assert f"--image {tmp_path / 'film.tif'} has several frames; only the first is used" in caplog.text
