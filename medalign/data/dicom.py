"""DICOM pictures as a radiologist's screen shows them; of all tags, only those that say how to show pixels are used.

Not applied are overlays (groups 60xx), shutters, ICC profiles, presentation states, PixelAspectRatio, and a
WindowCenter or WindowWidth without the other. What has no branch here is refused by name: a guess would be a wrong
picture that nobody notices.

The only file that imports pydicom, which is optional.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from medalign.data.code_streams import JPEG, JPEG_2000, read_code_stream
from medalign.data.dicom_gray import DicomError, eight_bit, require_little_endian, shown_gray, stored_value

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422")
_JPEG_2000_COLOR = ("YBR_RCT", "YBR_ICT")  # undone by the decoder of JPEG 2000; nothing else has them
_PALETTE = "PALETTE COLOR"
_SUPPLEMENTAL = ("COLOR", "MIXED")  # gray values of which some are shown in color
_MOST_PIXELS = 178_956_970  # as many as Pillow opens
_BEGINNINGS = (b"\x02\x00", b"\x08\x00")  # the first group of a file without preamble, as no other format begins
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does, with or without its preamble."""
    return data[128:132] == b"DICM" or data[:2] in _BEGINNINGS


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height. Raises DicomError."""
    with _refusing("it is not a DICOM picture"):
        study = _read(data, header_only=True)
        return int(study.Columns), int(study.Rows)


def has_several_frames(data: bytes) -> bool:
    """Whether there are frames that `picture` does not show. Raises DicomError."""
    with _refusing("its frames cannot be counted"):
        return int(_read(data, header_only=True).get("NumberOfFrames") or 1) != 1 or _holds_several(_read(data))


def picture(data: bytes) -> Image.Image:
    """The (first) frame, 8 bits, mode L or RGB.

    Color is RGB from whatever the file has it in, deep color scaled from its stored bits. Gray goes from stored values
    through the modality LUT and the (first) VOI LUT or window (DICOM PS3.3 C.11), and is turned over for MONOCHROME1
    or an inverse presentation LUT shape. Without a window of its own, it is spread from its darkest to its brightest
    value. Padding is black and counts for neither. Names, dates and numbers of patients stay in the bytes: nothing of
    them comes with the picture. Raises DicomError.
    """
    with _refusing("its pixels cannot be decoded"):
        study = _read(data)
        _set_transfer_syntax(study)
        interpretation = _interpretation(study)
        _check_stored(study)
        if interpretation in _GRAY:
            frames = _frame(study), lambda: _frame(study, correct_unused_bits=False)
            return Image.fromarray(shown_gray(study, *frames))
        return Image.fromarray(_through_palette(study) if interpretation == _PALETTE else _color(study))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever pydicom raises becomes a DicomError that says so in one line."""
    try:
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise DicomError("pydicom is not installed; pip install pydicom") from error
    try:
        yield
    except DicomError:
        raise
    except (BytesLengthException, InvalidDicomError, *_UNREADABLE) as error:
        raise DicomError(f"{what}: {' '.join(str(error).split())}") from error


def _read(data: bytes, header_only: bool = False) -> Any:
    from pydicom import dcmread

    study = dcmread(io.BytesIO(data), stop_before_pixels=header_only, force=True)
    if "Rows" not in study or "Columns" not in study:
        raise DicomError("it is not a DICOM file with a picture: it has no Rows and Columns")
    if not 0 < int(study.Columns) * int(study.Rows) <= _MOST_PIXELS:
        raise DicomError(f"it has {study.Columns} x {study.Rows} pixels; 1 to {_MOST_PIXELS} are read")
    return study


def _set_transfer_syntax(study: Any) -> None:
    """Where the file names none, that of plain pixels in the encoding of its tags."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if study.file_meta.get("TransferSyntaxUID"):
        return
    if "PixelData" in study and study["PixelData"].is_undefined_length:
        raise DicomError("its pixels are compressed, and it has no TransferSyntaxUID that says how")
    implicit, little = study.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    study.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _interpretation(study: Any) -> str:
    """What the pixels stand for. Raises DicomError for what is not known here."""
    from pydicom.uid import JPEG2000TransferSyntaxes

    found = str(study.get("PhotometricInterpretation") or "missing").strip()
    known: tuple[str, ...] = (*_GRAY, _PALETTE, *_COLOR)
    if study.file_meta.TransferSyntaxUID in JPEG2000TransferSyntaxes:
        known += _JPEG_2000_COLOR
    if found not in known:
        raise DicomError(f"its PhotometricInterpretation is {found}; read are {', '.join(known)}")
    samples, wanted = study.get("SamplesPerPixel"), 1 if found in (*_GRAY, _PALETTE) else 3
    if samples != wanted:
        raise DicomError(f"its SamplesPerPixel is {samples}; {found} has {wanted}")
    if study.get("PixelPresentation") in _SUPPLEMENTAL:
        raise DicomError(f"its PixelPresentation is {study.PixelPresentation}; supplemental palettes are not read")
    return found


def _color(study: Any) -> np.ndarray:
    """uint8 [rows, columns, 3]."""
    values = _marked_jpeg(study)
    if values is None:
        values = _frame(study)
    if study.PixelRepresentation != 0:
        raise DicomError("its color has signed values")
    return eight_bit(values, 2 ** int(study.BitsStored) - 1)


def _check_stored(study: Any) -> None:
    """Raises DicomError where bits or code stream differ from the tags, so that wrong pixels would come out."""
    if "PixelData" not in study:
        return
    stored, high = int(study.BitsStored), int(study.get("HighBit", study.BitsStored - 1))
    if high != stored - 1:
        raise DicomError(f"its HighBit is {high} with BitsStored {stored}; only {stored - 1} is read")
    if not study.file_meta.TransferSyntaxUID.is_compressed:
        return
    stream = read_code_stream(_first_frame(study))
    if stream is None:
        return
    if (stream.width, stream.height) != (study.Columns, study.Rows):
        raise DicomError(
            f"its code stream has {stream.width} x {stream.height} pixels, not {study.Columns} x {study.Rows}"
        )
    if stream.precision > study.BitsAllocated:
        raise DicomError(f"its code stream has {stream.precision} bits, but BitsAllocated is {study.BitsAllocated}")
    unmarked = _is_lossy_jpeg(study) and stream.components == b"\1\2\3" and not stream.tells_colors
    if unmarked and study.PhotometricInterpretation.strip() == "RGB":
        raise DicomError("its JPEG is named RGB, but has no JFIF or Adobe marker that tells RGB from YCbCr")


def _holds_several(study: Any) -> bool:
    """Whether the bytes are those of more than one frame, for some writers leave NumberOfFrames out."""
    from pydicom.encaps import generate_fragments
    from pydicom.pixels.utils import get_expected_length

    if "PixelData" not in study:
        return False
    if study["PixelData"].is_undefined_length:
        return sum(part.startswith((JPEG, JPEG_2000)) for part in generate_fragments(study.PixelData)) > 1
    one = get_expected_length(study)  # bytes, to which one is added where they are odd
    return len(study.PixelData) >= max(one + one % 2 + 1, 2 * one)


def _is_lossy_jpeg(study: Any) -> bool:
    from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

    return study.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit)


def _first_frame(study: Any) -> bytes:
    """The first frame as it is compressed."""
    from pydicom.encaps import get_frame

    offsets = study.get("ExtendedOffsetTable"), study.get("ExtendedOffsetTableLengths")
    frames = int(study.get("NumberOfFrames") or 1)
    return get_frame(study.PixelData, 0, extended_offsets=offsets if all(offsets) else None, number_of_frames=frames)


def _marked_jpeg(study: Any) -> np.ndarray | None:
    """The frame as RGB if it is a JPEG whose own Adobe marker tells its colors; then libjpeg converts it.

    pydicom leaves that conversion in place and, by the tags, makes another of the outcome.
    """
    if not _is_lossy_jpeg(study):
        return None
    image = Image.open(io.BytesIO(_first_frame(study)), formats=("JPEG",))
    return np.asarray(image.convert("RGB")) if "adobe_transform" in image.info else None


def _through_palette(study: Any) -> np.ndarray:
    """uint8 [rows, columns, 3]."""
    from pydicom.pixels import apply_color_lut

    require_little_endian(study)
    count, first, bits = study.RedPaletteColorLookupTableDescriptor
    count = count or 1 << 16
    if bits not in (8, 16) or (bits == 8 and count > 256):
        raise DicomError(f"its palette has {count} entries of {bits} bits; read are 8 bits, up to 256 entries, and 16")
    table = apply_color_lut(np.arange(first, first + count), study)[:, :3]
    # Some writers call entries of 8 bits, each in 16, entries of 16 bits.
    table = eight_bit(table, 255 if table.max() <= 255 else 65_535)
    stored = _frame(study)
    return table[(stored.astype(np.int64) - stored_value(first, stored)).clip(0, count - 1)]


def _frame(study: Any, **options: Any) -> np.ndarray:
    """The first frame's stored values, [rows, columns] or [rows, columns, 3]; YBR is RGB by then."""
    from pydicom.pixels import pixel_array

    return pixel_array(study, index=0, **options)
