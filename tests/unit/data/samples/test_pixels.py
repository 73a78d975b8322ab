"""Pixels of every type are decoded as an image viewer shows them, or refused by name; formats come from one list."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin

from medalign.data.samples.decode import FORMATS, decode_image, decode_mask, has_several_frames, picture_header
from medalign.data.samples.sample import BadSample

ROOT = Path(__file__).parents[4]
RAMP = np.tile(np.arange(256), (4, 1))  # all levels; enough pixels for percentiles
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode in ("L", "RGB")
    return np.asarray(image).astype(int)


def png(values: np.ndarray, bits: int, color: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of a type that Pillow does not write, chunk by chunk; values [rows, columns(, channels)]."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)), *extra]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IDAT", packed), (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed gray TIFF of any number type, tag by tag."""
    names = {"ImageWidth": values.shape[1], "ImageLength": values.shape[0], "Compression": 1, "SamplesPerPixel": 1}
    numbers = {"u": 1, "i": 2, "f": 3}
    names |= {"BitsPerSample": 8 * values.dtype.itemsize, "PhotometricInterpretation": 1, "StripOffsets": 8}
    names |= {"StripByteCounts": values.nbytes, "SampleFormat": numbers[values.dtype.kind], **tags}
    codes = {name: code for code, name in ((c, TiffImagePlugin.TiffTags.lookup(c).name) for c in range(254, 340))}
    entries = sorted((codes[name], value) for name, value in names.items())
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in entries) + b"\0\0\0\0"
    return struct.pack("<2sHI", b"II", 42, 8 + values.nbytes) + values.tobytes() + directory


ALPHA = np.where(RAMP < 128, 0, 255).astype(np.uint8)  # the left half is transparent
HIDDEN = np.dstack([COLORS, ALPHA])
HALF = np.dstack([COLORS, np.full_like(ALPHA, 51)])  # a fifth
ON_WHITE = np.where(ALPHA[..., None] == 255, COLORS, 255)
GRAY_ON_WHITE = np.where(ALPHA == 255, RAMP, 255)


def gray_alpha() -> Image.Image:
    return Image.merge("LA", [Image.fromarray(RAMP.astype(np.uint8)), Image.fromarray(ALPHA)])


def palette(transparent: int | bytes) -> bytes:
    image = Image.fromarray(RAMP.astype(np.uint8), "L").convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    return encode(image, "PNG", transparency=transparent)


TRANSPARENT: dict[str, tuple[bytes, np.ndarray]] = {
    "RGBA": (encode(Image.fromarray(HIDDEN), "PNG"), ON_WHITE),
    "WebP": (encode(Image.fromarray(HIDDEN), "WEBP", lossless=True, exact=True), ON_WHITE),
    "TIFF": (encode(Image.fromarray(HIDDEN), "TIFF"), ON_WHITE),
    "partly": (encode(Image.fromarray(HALF), "PNG"), np.rint(COLORS * 0.2 + 255 * 0.8)),
    "LA": (encode(gray_alpha(), "PNG"), GRAY_ON_WHITE),
    "palette of opacities": (palette(bytes([0] * 128 + [255] * 128)), ON_WHITE),
    "palette of one": (palette(7), np.where(RAMP[..., None] == 7, 255, COLORS)),
    "one gray": (png(RAMP, 8, 0, (b"tRNS", b"\0\x07")), np.where(RAMP == 7, 255, RAMP)),
    "one color": (
        png(COLORS, 8, 2, (b"tRNS", struct.pack(">HHH", *COLORS[0, 7]))),
        np.where((COLORS[0, 7] == COLORS).all(-1, keepdims=True), 255, COLORS),
    ),
    "16 bits": (png(HIDDEN.astype(int) * 257, 16, 6), ON_WHITE),
    "opaque": (encode(Image.fromarray(COLORS).convert("RGBA"), "PNG"), COLORS),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_are_shown_on_white(kind: str) -> None:
    data, wanted = TRANSPARENT[kind]
    assert np.abs(pixels(data) - wanted).max() <= (1 if kind == "partly" else 0)  # a level, of 8-bit blending


def test_one_transparent_level_of_deep_gray() -> None:
    deep = RAMP * 100 + 5000
    data = png(np.where(RAMP == 255, 0, deep), 16, 0, (b"tRNS", b"\0\0"))  # 0 is transparent
    shown = pixels(data)
    assert (shown[:, 255] == 255).all()
    assert shown[0, 0] == 0 and abs(shown[0, 127] - 128) <= 1  # spread over what is visible


def test_masks_keep_their_values() -> None:
    for data, channels in ((palette(0), None), (encode(gray_alpha(), "PNG"), 2)):
        values = np.asarray(decode_mask(data))
        assert np.array_equal(values if channels is None else values[..., 0], RAMP)
    assert np.array_equal(np.asarray(decode_mask(png(RAMP * 3, 16, 0))), RAMP * 3)


WIDE = np.tile(np.linspace(0, 1, 1000), (4, 1))
WINDOWED = np.rint(((WIDE - 0.005) / 0.99).clip(0, 1) * 255)  # the darkest and brightest half per cent cut off
DEEP: dict[str, bytes] = {
    "16 bits": png(np.rint(WIDE * 4095), 16, 0),
    "TIFF of 16 bits": tiff(np.rint(WIDE * 4095).astype(np.uint16)),
    "TIFF of 16 bits, signed": tiff(np.rint(WIDE * 4095 - 2000).astype(np.int16)),
    "TIFF of 16 bits, white is 0": tiff(np.rint((1 - WIDE) * 4095).astype(np.uint16), PhotometricInterpretation=0),
    "TIFF of 32 bits": tiff(np.rint(WIDE * 1e5 - 5e4).astype(np.int32)),
    "TIFF of 32 bits without sign": tiff(np.rint(WIDE * (2**32 - 1)).astype(np.uint32)),
    "TIFF of floats": tiff(WIDE.astype(np.float32) * 1e-8),
    "TIFF of floats, white is 0": tiff((1 - WIDE).astype(np.float32), PhotometricInterpretation=0),
    "PGM of 16 bits": b"P5 1000 4 4095\n" + np.rint(WIDE * 4095).astype(">u2").tobytes(),
    "JPEG 2000 of 16 bits": encode(Image.fromarray(np.rint(WIDE * 4095).astype(np.uint16)), "JPEG2000"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_gray_is_spread_over_the_levels(kind: str) -> None:
    assert np.abs(pixels(DEEP[kind]) - WINDOWED).max() <= 1  # a level: percentiles fall between two values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_numbers_are_refused(value: float) -> None:
    values = WIDE.astype(np.float32)
    values[1, 500:502] = value
    with pytest.raises(BadSample, match=r"image has 2 pixels that are not finite \(NaN or infinite\)"):
        decode_image(tiff(values))


def lab() -> bytes:
    """A TIFF with L* 50 and a*, b* 0: gray level 119 in sRGB."""
    middle = np.zeros((4, 6, 3), np.uint8)
    middle[..., 0] = 128
    return encode(Image.fromarray(middle, "LAB"), "TIFF")


COLOR: dict[str, tuple[bytes, np.ndarray, int]] = {
    "one bit": (encode(Image.fromarray(RAMP > 127), "PNG"), np.where(RAMP > 127, 255, 0), 0),
    "palette": (encode(Image.fromarray(COLORS).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), COLORS, 12),
    "PNG of 48 bits": (png(COLORS.astype(int) * 257, 16, 2), COLORS, 0),
    "CMYK": (encode(Image.fromarray(COLORS).convert("CMYK"), "TIFF"), COLORS, 1),
    "CMYK as JPEG": (encode(Image.fromarray(COLORS).convert("CMYK"), "JPEG", quality=100), COLORS, 6),
    "YCbCr": (encode(Image.fromarray(COLORS).convert("YCbCr"), "TIFF"), COLORS, 3),
    "LAB": (lab(), np.full((4, 6, 3), 119), 2),
    "BMP": (encode(Image.fromarray(COLORS), "BMP"), COLORS, 0),
    "PPM": (encode(Image.fromarray(COLORS), "PPM"), COLORS, 0),
    "JPEG 2000": (encode(Image.fromarray(COLORS), "JPEG2000", no_jp2=True), COLORS, 0),
    "GIF": (encode(Image.fromarray(RAMP.astype(np.uint8)), "GIF"), RAMP, 0),
}


@pytest.mark.parametrize("kind", COLOR)
def test_colors_of_every_kind(kind: str) -> None:
    data, wanted, tolerance = COLOR[kind]  # levels, of 8-bit conversions and JPEG
    assert np.abs(pixels(data) - wanted).max() <= tolerance


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(np.dstack([RAMP, ALPHA]), 16, 4), "16-bit gray with transparency"),
        (tiff(RAMP.astype(np.int8)), "mode signed L"),
        (tiff(WIDE.astype(np.float64)), "none of the supported formats"),
    ],
)
def test_pixels_that_would_be_decoded_incorrectly_are_refused(data: bytes, reason: str) -> None:
    for read in (decode_image, picture_header):
        with pytest.raises(BadSample, match=reason):
            read(data)


def frames(kind: str, count: int) -> bytes:
    first, *rest = (Image.fromarray(np.roll(COLORS, i * 9, 1)) for i in range(count))
    return encode(first, kind, save_all=True, append_images=rest, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP", "MPO"])
def test_the_first_of_several_frames_is_used_and_noted(kind: str) -> None:
    assert has_several_frames(frames(kind, 3))
    assert not has_several_frames(frames(kind, 1))
    tolerance = {"GIF": 40, "MPO": 40}.get(kind, 0)  # 256 colors; JPEG with shared chroma
    assert np.abs(pixels(frames(kind, 3)) - COLORS).max() <= tolerance


@pytest.mark.parametrize("kind", FORMATS)
def test_the_header_gives_the_extension_of_every_format(kind: str) -> None:
    data = frames("MPO", 2) if kind == "MPO" else encode(Image.fromarray(COLORS), kind)
    assert picture_header(data) == (FORMATS[kind], 256, 4)
    assert decode_image(data).size == (256, 4)


def test_no_program_is_started_for_postscript(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    drawing, header = encode(Image.fromarray(COLORS), "EPS"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for read in (decode_image, decode_mask, picture_header, has_several_frames):
        for data in (drawing, header, encode(Image.new("L", (9, 9)), "TGA")):
            with pytest.raises(BadSample, match="none of the supported formats: PNG, JPEG, WEBP, TIFF, .*, DICOM"):
                read(data)


def test_all_code_opens_images_with_the_list_of_formats() -> None:
    calls = [
        (path.name, call)
        for folder in ("medalign", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for call in re.findall(r"Image\.open\(.*", path.read_text(encoding="utf-8"))
    ]
    assert len(calls) >= 2
    assert [name for name, call in calls if "formats=" not in call] == []


def test_decompression_bombs_are_refused() -> None:
    huge = png(np.zeros((1, 1)), 8, 0).replace(struct.pack(">II", 1, 1), struct.pack(">II", 40_000, 40_000))
    bomb = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    for read in (decode_image, picture_header):
        with pytest.raises(BadSample, match="decompression bomb"):
            read(bomb)
