"""Color DICOM: every color model is converted to RGB exactly once; unknown ones are refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut
from pydicom.uid import JPEG2000, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from medalign.data.samples.decode import decode_image
from medalign.data.samples.sample import BadSample
from tests.unit.data.dicom_files import compressed, data_set, file_of, jpeg, study

RED, BLUE = (220, 30, 30), (30, 60, 200)
HALVES = np.zeros((32, 64, 3), np.uint8)
HALVES[:, :32], HALVES[:, 32:] = RED, BLUE
OTHER = HALVES[:, ::-1].copy()  # a second frame
TOLERANCE = 4  # levels: 8 bits of Y, Cb and Cr, and JPEG at quality 95 away from edges


def ybr(rgb: np.ndarray) -> np.ndarray:
    """YBR_FULL as defined in PS3.3 C.7.6.3.1.2."""
    red, green, blue = np.moveaxis(rgb.astype(float), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = -0.1687 * red - 0.3313 * green + 0.5 * blue + 128, 0.5 * red - 0.4187 * green - 0.0813 * blue + 128
    return np.rint(np.stack([luma, *chroma], -1)).clip(0, 255).astype(np.uint8)


def ybr_422(rgb: np.ndarray) -> bytes:
    """Y Y Cb Cr per two pixels of a row."""
    full = ybr(rgb)
    pairs = np.stack([full[:, ::2, 0], full[:, 1::2, 0], full[:, ::2, 1], full[:, ::2, 2]], -1)
    return pairs.tobytes()


def jpeg_2000(rgb: np.ndarray, color_transform: bool = True, lossy: bool = False) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(rgb)
    image.save(buffer, "JPEG2000", no_jp2=True, mct=int(color_transform), irreversible=lossy)
    return buffer.getvalue()


def planes(rgb: np.ndarray) -> bytes:
    return np.moveaxis(rgb, -1, 0).tobytes()


def files() -> dict[str, Dataset]:
    full = {"PhotometricInterpretation": "YBR_FULL"}
    half = {"PhotometricInterpretation": "YBR_FULL_422"}
    two = {"NumberOfFrames": 2}
    return {
        "RGB": data_set(HALVES),
        "RGB by planes": data_set(HALVES, PlanarConfiguration=1, PixelData=planes(HALVES)),
        "RGB, implicit": data_set(HALVES, ImplicitVRLittleEndian),
        "RGB, two frames": data_set(HALVES, PixelData=HALVES.tobytes() + OTHER.tobytes(), **two),
        "YBR_FULL": data_set(ybr(HALVES), **full),
        "YBR_FULL by planes": data_set(HALVES, PlanarConfiguration=1, PixelData=planes(ybr(HALVES)), **full),
        "YBR_FULL, two frames": data_set(HALVES, PixelData=ybr(HALVES).tobytes() + ybr(OTHER).tobytes(), **full, **two),
        "YBR_FULL_422": data_set(HALVES, PixelData=ybr_422(HALVES), **half),
        "YBR_FULL_422, two frames": data_set(HALVES, PixelData=ybr_422(HALVES) + ybr_422(OTHER), **half, **two),
        "JPEG YBR_FULL": compressed([jpeg(HALVES)], HALVES, JPEGBaseline8Bit, **full),
        "JPEG YBR_FULL_422": compressed([jpeg(HALVES, 1)], HALVES, JPEGBaseline8Bit, **half),
        "JPEG, two frames": compressed([jpeg(HALVES, 1), jpeg(OTHER, 1)], HALVES, JPEGBaseline8Bit, **half, **two),
        "JPEG with JFIF, named RGB": compressed([jpeg(HALVES)], HALVES, JPEGBaseline8Bit),
        "JPEG with Adobe's marker": compressed([jpeg(HALVES, adobe=1, jfif=False)], HALVES, JPEGBaseline8Bit, **half),
        "JPEG with both markers": compressed([jpeg(HALVES, adobe=1)], HALVES, JPEGBaseline8Bit, **full),
        "JPEG 2000 RGB": compressed([jpeg_2000(HALVES, False)], HALVES, JPEG2000Lossless),
        "JPEG 2000 YBR_RCT": compressed(
            [jpeg_2000(HALVES)], HALVES, JPEG2000Lossless, PhotometricInterpretation="YBR_RCT"
        ),
        "JPEG 2000 YBR_ICT": compressed(
            [jpeg_2000(HALVES, lossy=True)], HALVES, JPEG2000, PhotometricInterpretation="YBR_ICT"
        ),
        "JPEG 2000, two frames": compressed(
            [jpeg_2000(HALVES), jpeg_2000(OTHER)], HALVES, JPEG2000Lossless, PhotometricInterpretation="YBR_RCT", **two
        ),
    }


@pytest.mark.parametrize("name", files())
def test_color_is_converted_once(name: str) -> None:
    image = decode_image(file_of(files()[name]))
    assert (image.mode, image.size) == ("RGB", (64, 32))
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[:, 4:24] - RED).max() <= TOLERANCE  # without the edges, where chroma is shared
    assert np.abs(pixels[:, 40:60] - BLUE).max() <= TOLERANCE


def test_color_compressed_by_run_lengths() -> None:
    one = data_set(ybr(HALVES), PhotometricInterpretation="YBR_FULL")
    one.compress(RLELossless, generate_instance_uid=False)
    assert np.abs(np.asarray(decode_image(file_of(one))).astype(int)[:, 40:] - BLUE).max() <= TOLERANCE


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_color_is_scaled_and_does_not_wrap(bits: int) -> None:
    top = 2**bits - 1
    deep = np.rint(HALVES / 255 * top).astype(np.uint16)
    tags = {"BitsAllocated": 16, "BitsStored": bits, "HighBit": bits - 1}
    shown = np.asarray(decode_image(study(HALVES, PixelData=deep.tobytes(), **tags)))
    assert np.abs(shown.astype(int) - HALVES).max() <= (1 if bits == 10 else 0)  # 10 bits round back to a neighbor
    assert np.array_equal(shown, np.rint(deep * (255 / top)))


def palette(entries: np.ndarray, bits: int, first: int = 0, **tags: object) -> Dataset:
    """Indices from `first`, once each, through a palette [entries, 3] of unsigned integers."""
    indices = np.arange(first, first + 256).reshape(16, 16)
    one = data_set(indices, PhotometricInterpretation="PALETTE COLOR", BitsStored=16, HighBit=15, **tags)
    for name, column in zip(("Red", "Green", "Blue"), entries.T, strict=True):
        setattr(one, f"{name}PaletteColorLookupTableDescriptor", [len(entries), first, bits])
        setattr(one, f"{name}PaletteColorLookupTableData", column.tobytes())
    return one


COUNT = np.arange(256)
ENTRIES = np.stack([255 - COUNT, 0 * COUNT, COUNT], -1)


@pytest.mark.parametrize(
    ("entries", "bits"),
    [
        (ENTRIES.astype(np.uint8), 8),
        (ENTRIES.astype(np.uint16) * 257, 16),
        (ENTRIES.astype(np.uint16), 8),  # in 16 bits each
        (ENTRIES.astype(np.uint16), 16),  # and declared as 16 bits
    ],
)
@pytest.mark.parametrize("first", [0, 700])
def test_palettes_are_applied(entries: np.ndarray, bits: int, first: int) -> None:
    image = decode_image(file_of(palette(entries, bits, first)))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image).reshape(-1, 3), ENTRIES)


def test_indices_beyond_the_palette_take_its_ends() -> None:
    one = palette(ENTRIES.astype(np.uint8), 8, 300)
    one.PixelData = np.repeat(np.array([0, 299, 300, 555, 556, 4095], np.uint16), 64)[:256].tobytes()
    shown = np.asarray(decode_image(file_of(one))).reshape(-1, 3)
    assert shown[[0, 64, 128, 192]].tolist() == [[255, 0, 0], [255, 0, 0], [255, 0, 0], [0, 0, 255]]


def test_segmented_palettes_are_expanded() -> None:
    one = palette(ENTRIES.astype(np.uint16), 16)
    for name, ends in {"Red": (0, 65_535), "Green": (65_535, 0), "Blue": (0, 0)}.items():
        delattr(one, f"{name}PaletteColorLookupTableData")
        segments = np.array([0, 1, ends[0], 1, 255, ends[1]], np.uint16)  # one entry, and a line to the last
        setattr(one, f"Segmented{name}PaletteColorLookupTableData", segments.tobytes())
    shown = np.asarray(decode_image(file_of(one))).reshape(-1, 3)
    assert np.array_equal(shown, np.stack([COUNT, 255 - COUNT, 0 * COUNT], -1))
    assert np.array_equal(shown, np.rint(apply_color_lut(one.pixel_array, one).reshape(-1, 3) / 257))


GRAY = np.zeros((4, 6), int)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_dcmtk_+eb+cr",
        "SC_rgb_dcmtk_+eb+cy+n1",
        "SC_rgb_dcmtk_+eb+cy+np",
        "SC_rgb_gdcm_KY",
        "SC_rgb_jpeg_dcmtk",
        "SC_rgb_jpeg_lossy_gdcm",
        "SC_rgb_rle_16bit_2frame",
        "SC_rgb_rle_32bit",
        "SC_ybr_full_422_uncompressed",
    ],
)
def test_files_of_other_tools(name: str) -> None:
    """A test card from pydicom's wheel, written by DCMTK, GDCM and others: red on top, pale blue, white below."""
    path = get_testdata_file(f"{name}.dcm", download=False)
    pixels = np.asarray(decode_image(Path(path).read_bytes())).astype(int)
    for row, wanted in {5: (255, 0, 0), 50: (128, 128, 255), 95: (255, 255, 255)}.items():
        assert np.abs(pixels[row, 50] - wanted).max() <= TOLERANCE


REFUSED = {
    "PhotometricInterpretation is HSV": study(HALVES, PhotometricInterpretation="HSV"),
    "PhotometricInterpretation is CIELAB": study(HALVES, PhotometricInterpretation="CIELAB"),
    "PhotometricInterpretation is YBR_PARTIAL_422": study(HALVES, PhotometricInterpretation="YBR_PARTIAL_422"),
    "PhotometricInterpretation is YBR_RCT": study(HALVES, PhotometricInterpretation="YBR_RCT"),
    "PhotometricInterpretation is missing": study(HALVES, PhotometricInterpretation=""),
    "PhotometricInterpretation is CMYK": study(HALVES, PhotometricInterpretation="CMYK", SamplesPerPixel=4),
    "SamplesPerPixel is 1; RGB requires 3": study(GRAY, PhotometricInterpretation="RGB"),
    "SamplesPerPixel is 3; MONOCHROME2 requires 1": study(HALVES, PhotometricInterpretation="MONOCHROME2"),
    "PixelPresentation is COLOR": study(GRAY, PixelPresentation="COLOR"),
    "color values are signed": study(HALVES, PixelRepresentation=1),
    "code stream has 64 x 32 pixels, not 32 x 64": file_of(
        compressed([jpeg(HALVES)], HALVES, JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL", Rows=64, Columns=32)
    ),
    "code stream has 64 x 32 pixels, not 64 x 16": file_of(
        compressed([jpeg_2000(HALVES, False)], HALVES, JPEG2000Lossless, Rows=16)
    ),
    "code stream has 8 bits, but BitsStored is 7": file_of(
        compressed([jpeg_2000(HALVES, False)], HALVES, JPEG2000Lossless, BitsStored=7, HighBit=6)
    ),
    "code stream has 8 bits, but BitsStored is 16": file_of(
        compressed([jpeg(HALVES, adobe=1)], HALVES, JPEGBaseline8Bit, BitsAllocated=16, BitsStored=16, HighBit=15)
    ),
    "declared RGB, but has no JFIF or Adobe marker": file_of(
        compressed([jpeg(HALVES, jfif=False)], HALVES, JPEGBaseline8Bit)
    ),
    "RedPaletteColorLookupTableDescriptor": study(GRAY, PhotometricInterpretation="PALETTE COLOR"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unknown_values_are_refused_by_name(reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(REFUSED[reason])


def test_a_palette_that_pydicom_would_wrap_is_refused() -> None:
    entries = np.zeros((512, 3), np.uint8)
    with pytest.raises(BadSample, match="palette has 512 entries of 8 bits"):
        decode_image(file_of(palette(entries, 8)))
