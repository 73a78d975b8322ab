"""Gray DICOM: windows, tables, padding and signs as defined in PS3.3 C.11, compared with pydicom's functions."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from medalign.data.samples.decode import decode_image, has_several_frames, picture_header
from medalign.data.samples.sample import BadSample
from tests.unit.data.dicom_files import compressed, data_set, file_of, study

RAMP = np.tile(np.arange(0, 4000, 40), (20, 1))
SIGNED = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15}


def shown(one: Dataset | bytes) -> np.ndarray:
    image = decode_image(one if isinstance(one, bytes) else file_of(one))
    assert image.mode == "L"
    return np.asarray(image).astype(int)


def windowed(value: float, center: float, width: float, function: str) -> float:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, from 0 to 255."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(min(-4 * (value - center) / width, 700)))  # exp of more overflows
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if value <= center - width / 2:
        return 0
    if value > center + width / 2:
        return 255
    return ((value - center) / width + 0.5) * 255


def expected(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    return np.array([[windowed(float(value), center, width, function) for value in row] for row in values])


WINDOWS = [
    (1000, 1000, "LINEAR"),
    (1000, 2, "LINEAR"),
    (1000, 1, "LINEAR"),  # a threshold
    (1000.5, 1, "LINEAR"),
    (1000, 1000, "LINEAR_EXACT"),
    (1000, 0.5, "LINEAR_EXACT"),
    (1000, 400, "SIGMOID"),
    (1000, 0.01, "SIGMOID"),
]


@pytest.mark.parametrize(("center", "width", "function"), WINDOWS)
def test_windows_are_those_of_the_standard(center: float, width: float, function: str) -> None:
    one = data_set(RAMP, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    found = shown(one)
    wanted = expected(RAMP, center, width, function)
    assert np.abs(found - wanted).max() <= 0.5  # rounding to a level
    if width > 0.01:  # there pydicom overflows
        theirs = apply_windowing(one.pixel_array, one) / 4095 * 255
        assert np.abs(found - theirs).max() <= 0.5


def test_width_one_is_a_threshold() -> None:
    values = np.array([[998, 999, 1000, 1001]])
    assert shown(study(values, WindowCenter=1000, WindowWidth=1)).tolist() == [[0, 0, 255, 255]]


def test_the_first_of_several_windows_is_taken() -> None:
    several = study(RAMP, WindowCenter=[1000, 50], WindowWidth=[2000, 9])
    assert np.array_equal(shown(several), shown(study(RAMP, WindowCenter=1000, WindowWidth=2000)))


@pytest.mark.parametrize("empty", [{"WindowCenter": None, "WindowWidth": None}, {"VOILUTSequence": []}])
def test_an_empty_window_is_ignored(empty: dict[str, Any]) -> None:
    assert np.array_equal(shown(study(RAMP, **empty)), shown(study(RAMP)))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"WindowWidth": 0}, "width 0; LINEAR needs a width of at least 1"),
        ({"WindowWidth": 0.5}, "width 0.5; LINEAR needs a width of at least 1"),
        ({"WindowWidth": -300}, "width -300; LINEAR needs"),
        ({"WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"}, "LINEAR_EXACT needs a width of more than 0"),
        ({"WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, "SIGMOID needs a width of more than 0"),
        ({"WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "VOILUTFunction is CUBIC"),
        ({"WindowWidth": 9, "PresentationLUTShape": "LIN OD"}, "shape LIN OD"),
    ],
)
def test_invalid_windows_are_refused(tags: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(study(RAMP, WindowCenter=1000, **tags))


def test_rescaling_signs_and_inversion() -> None:
    hounsfield = np.tile(np.arange(-1024, 1024, 16), (4, 1))
    one = data_set(hounsfield, WindowCenter=40, WindowWidth=400, **SIGNED)
    assert np.abs(shown(one) - apply_windowing(one.pixel_array, one) / 65535 * 255 - 127.5).max() <= 0.51
    slope = data_set(RAMP, RescaleSlope="0.5", RescaleIntercept="-1024", WindowCenter=40, WindowWidth=400)
    wanted = expected(RAMP * 0.5 - 1024, 40, 400, "LINEAR")
    assert np.abs(shown(slope) - wanted).max() <= 0.5
    falling = shown(study(RAMP, RescaleSlope=-1, RescaleIntercept=0))
    assert (falling[0, 0], falling[0, -1]) == (255, 0)
    assert np.array_equal(shown(study(RAMP, RescaleSlope=None, RescaleIntercept=None)), shown(study(RAMP)))
    plain = shown(study(RAMP))
    for inverse in ({"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}):
        assert np.array_equal(shown(study(RAMP, **inverse)), 255 - plain)
    both = study(RAMP, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    assert np.array_equal(shown(both), 255 - plain)  # the two tags mean the same, PS3.3 C.8.11.1


def table(entries: np.ndarray, first: int, bits: int, vr: str) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    if vr == "OW":
        item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    else:
        item.add_new("LUTData", "US", entries.tolist())
    return item


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [10, 16])
def test_lookup_tables_of_modality_and_display(vr: str, bits: int) -> None:
    entries = np.rint(np.sqrt(np.linspace(0, 1, 2000)) * (2**bits - 1)).astype(np.uint16)
    voi = data_set(RAMP, VOILUTSequence=[table(entries, 500, bits, vr)], WindowCenter=1, WindowWidth=1)
    assert np.abs(shown(voi) - apply_voi(voi.pixel_array, voi) / (2**bits - 1) * 255).max() <= 0.5
    modality = data_set(RAMP, ModalityLUTSequence=[table(entries, 500, 16, vr)], WindowCenter=400, WindowWidth=800)
    values = apply_modality_lut(modality.pixel_array.astype(np.int32), modality)
    wanted = expected(values, 400, 800, "LINEAR")
    assert np.abs(shown(modality) - wanted).max() <= 0.5


def test_a_table_of_8_bits_and_more_entries_than_levels() -> None:
    entries = (np.arange(4096) // 16).astype(np.uint16)  # pydicom wraps the indices at 256
    found = shown(study(RAMP, VOILUTSequence=[table(entries, 0, 8, "US")]))
    assert np.array_equal(found, RAMP // 16)


def test_a_table_may_begin_below_zero() -> None:
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12}
    entries = (np.arange(4096) * 16).astype(np.uint16)
    found = shown(study(RAMP, VOILUTSequence=[table(entries, 64_512, 16, "US")], **tags))  # -1024
    assert np.abs(found - RAMP * 16 / 65_535 * 255).max() <= 0.5


def test_a_table_that_contradicts_its_descriptor_is_refused() -> None:
    for item in (table(np.arange(300, dtype=np.uint16), 0, 8, "US"), table(np.arange(9, dtype=np.uint16), 0, 20, "US")):
        with pytest.raises(BadSample, match="its lookup table has"):
            decode_image(study(RAMP, VOILUTSequence=[item]))


def test_enhanced_files_keep_windows_with_their_frames() -> None:
    window, rescale, groups = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 1000, 500
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -1000
    groups.FrameVOILUTSequence, groups.PixelValueTransformationSequence = [window], [rescale]
    flat = study(RAMP, WindowCenter=1000, WindowWidth=500, RescaleSlope=2, RescaleIntercept=-1000)
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        assert np.array_equal(shown(study(RAMP, **{name: [groups]})), shown(flat))


def padded(values: np.ndarray, padding: int) -> np.ndarray:
    border = np.full((values.shape[0], 8), padding)
    return np.concatenate([border, values, border], 1)


INNER = np.tile(np.linspace(100, 1100, 64).round().astype(int), (16, 1))
PADDING: dict[str, tuple[int, dict[str, Any]]] = {
    "below": (-32768, {**SIGNED, "PixelPaddingValue": -32768}),
    "above": (4095, {"PixelPaddingValue": 4095}),
    "with a window": (4095, {"PixelPaddingValue": 4095, "WindowCenter": 600, "WindowWidth": 1001}),
    "a range": (-2000, {**SIGNED, "PixelPaddingValue": -2048, "PixelPaddingRangeLimit": -1900}),
    "a range, falling": (4000, {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 3900}),
    "rescaled": (0, {"PixelPaddingValue": 0, "RescaleSlope": 2, "RescaleIntercept": -1024}),
    "unsigned tag of signed pixels": (-2000, {**SIGNED, "PixelPaddingValue": 63536}),
    "signed tag of unsigned pixels": (63536, {"BitsStored": 16, "HighBit": 15, "PixelPaddingValue": -2000}),
    "beyond the stored bits": (63536, {"PixelPaddingValue": -2000}),
    "beyond the stored bits, signed": (-32768, {"PixelRepresentation": 1, "PixelPaddingValue": -32768}),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", PADDING)
def test_padding_is_black_and_does_not_change_the_image(kind: str, inverse: bool) -> None:
    padding, tags = PADDING[kind]
    turned = {"PhotometricInterpretation": "MONOCHROME1"} if inverse else {}
    within = {name: value for name, value in tags.items() if "Padding" not in name}
    one = data_set(padded(INNER, padding), **within, **turned)
    for name in tags.keys() - within.keys():
        one.add_new(name, "SS" if tags[name] < 0 else "US", tags[name])  # as a writer with explicit VRs may store it
    found = shown(one)
    assert (found[:, :8] == 0).all() and (found[:, -8:] == 0).all()
    assert np.array_equal(found[:, 8:-8], shown(study(INNER, **within, **turned)))


def test_padding_of_8_bits_does_not_include_white() -> None:
    values = np.tile(np.arange(256), (2, 1))
    tags = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": values.astype(np.uint8).tobytes()}
    one = data_set(values, **tags)
    one.add_new("PixelPaddingValue", "US", 65535)  # does not fit in 8 bits
    assert np.array_equal(shown(one), values)


def test_an_image_of_padding_only_is_black() -> None:
    assert (shown(study(np.full((4, 4), 7), PixelPaddingValue=7)) == 0).all()


def test_unused_bits_are_ignored() -> None:
    dirty = RAMP | 0xA000
    assert np.array_equal(shown(study(dirty)), shown(study(RAMP)))


def test_float_pixels_and_pixels_that_are_not_finite() -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    one = data_set(values, BitsAllocated=32)
    del one.PixelData, one.BitsStored, one.HighBit, one.PixelRepresentation
    one.FloatPixelData = values.tobytes()
    assert np.array_equal(shown(one), np.rint((values.astype(float) + 1) * 127.5))
    values[3, 4], values[5, 5] = np.nan, np.inf
    one.FloatPixelData = values.tobytes()
    with pytest.raises(BadSample, match=r"2 of its pixels are not finite \(NaN or infinite\)"):
        decode_image(file_of(one))
    values[5, 5], values[3, 4] = -1e30, -1e30
    one.FloatPixelData, one.FloatPixelPaddingValue = values.tobytes(), -1e30
    found = shown(one)
    assert (found[3, 4], found[5, 5], found.max(), found[0, 1]) == (0, 0, 255, round(255 / 63))


def test_a_uniform_image_and_one_bit() -> None:
    assert np.ptp(shown(study(np.full((4, 4), 900)))) == 0
    bits = np.array([[0, 1, 1, 0, 1, 0, 0, 1]])
    packed = np.packbits(bits.astype(np.uint8), bitorder="little").tobytes() + b"\0"
    tags = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelData": packed}
    assert shown(study(bits, **tags)).tolist() == (bits * 255).tolist()


def test_the_first_of_several_frames_is_used_and_noted() -> None:
    frames = np.stack([RAMP, RAMP[:, ::-1]]).astype(np.uint16)
    several = study(RAMP, NumberOfFrames=2, PixelData=frames.tobytes())
    assert np.array_equal(shown(several), shown(study(RAMP)))
    assert has_several_frames(several)
    assert not has_several_frames(study(RAMP)) and not has_several_frames(study(RAMP, NumberOfFrames=1))


def without_preamble(one: Dataset) -> bytes:
    return file_of(one)[132:]


def test_files_without_preamble_or_transfer_syntax_are_read() -> None:
    assert np.array_equal(shown(without_preamble(data_set(RAMP))), shown(study(RAMP)))
    for implicit in (True, False):
        one = data_set(RAMP)
        del one.file_meta
        buffer = io.BytesIO()
        one.save_as(buffer, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        data = buffer.getvalue()
        assert b"DICM" not in data
        assert picture_header(data) == ("dcm", 100, 20)
        assert np.array_equal(shown(data), shown(study(RAMP)))


@pytest.mark.parametrize("cut", [150, 400, 1000, -900, -1])
def test_truncated_files_are_bad_samples(cut: int) -> None:
    with pytest.raises(BadSample, match="image cannot be decoded"):
        decode_image(study(RAMP)[:cut])


def test_a_tag_of_a_wrong_length_makes_a_bad_sample() -> None:
    rows = b"\x28\x00\x10\x00US"
    data = study(RAMP).replace(rows + b"\x02\x00\x14\x00", rows + b"\x03\x00\x14\x00\x00")
    for read in (decode_image, picture_header, has_several_frames):
        with pytest.raises(BadSample, match="Expected total bytes to be"):
            read(data)


def test_truncated_jpegs_and_impossible_sizes_are_bad_samples() -> None:
    color = np.zeros((32, 64, 3), np.uint8)
    with pytest.raises(BadSample, match="image cannot be decoded"):
        decode_image(file_of(compressed([b"\xff\xd8\xff\xe0 no more"], color, JPEGBaseline8Bit)))
    for rows, columns in ((65_535, 65_535), (0, 100)):
        with pytest.raises(BadSample, match=f"it has {columns} x {rows} pixels"):
            decode_image(study(RAMP, Rows=rows, Columns=columns))


def jpeg_2000(values: np.ndarray) -> bytes:
    """A code stream of 16 bits."""
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, "JPEG2000", no_jp2=True)
    return buffer.getvalue()


STREAM = jpeg_2000(RAMP)
DISAGREEING = {
    "HighBit is 15 with BitsStored 12; only 11 is supported": data_set(RAMP << 4, HighBit=15),
    "code stream has 16 bits, but BitsAllocated is 8": compressed(
        [STREAM], RAMP, JPEG2000Lossless, BitsAllocated=8, BitsStored=8, HighBit=7
    ),
    "code stream has 100 x 20 pixels, not 20 x 100": compressed([STREAM], RAMP, JPEG2000Lossless, Rows=100, Columns=20),
}


@pytest.mark.parametrize("reason", DISAGREEING)
def test_tags_that_contradict_the_pixels_are_refused(reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(file_of(DISAGREEING[reason]))


def test_a_code_stream_of_more_bits_than_are_stored_is_read() -> None:
    one = compressed([STREAM], RAMP, JPEG2000Lossless, WindowCenter=2000, WindowWidth=4000)
    assert np.array_equal(shown(one), shown(data_set(RAMP, WindowCenter=2000, WindowWidth=4000)))


def test_a_code_stream_with_values_beyond_the_stored_bits_is_refused() -> None:
    too_bright = np.where(RAMP.max() == RAMP, 4096, RAMP)
    with pytest.raises(BadSample, match=r"its values are from \d+ to 4096, which BitsStored 12 cannot hold"):
        decode_image(file_of(compressed([jpeg_2000(too_bright)], RAMP, JPEG2000Lossless)))


def test_padding_of_a_code_stream_may_be_beyond_the_stored_bits() -> None:
    values = padded(INNER, 63536)
    one = compressed([jpeg_2000(values)], values, JPEG2000Lossless, PixelPaddingValue=63536)
    assert np.array_equal(shown(one)[:, 8:-8], shown(data_set(INNER)))
