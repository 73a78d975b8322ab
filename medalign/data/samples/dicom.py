"""Decode DICOM images as a radiologist's screen shows them. Only tags about the display of pixels are used.

Overlays (groups 60xx), shutters, ICC profiles, presentation states, PixelAspectRatio, and a WindowCenter or WindowWidth
without the other are not applied. Anything that is not handled here is rejected by name, because a guess could be a
wrong image without a warning.

Only this file and `dicom_gray` handle pydicom, which is optional.
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

from medalign.data.samples.code_streams import JPEG, JPEG_2000, CodeStream, read_code_stream
from medalign.data.samples.dicom_gray import DicomError, display_values, eight_bit, look_up, require_little_endian

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422")
_JPEG_2000_COLOR = ("YBR_RCT", "YBR_ICT")  # decoded by the JPEG 2000 decoder; used by no other transfer syntax
_PALETTE = "PALETTE COLOR"
_SUPPLEMENTAL = ("COLOR", "MIXED")  # gray values, some of which are displayed in color
_MAX_PIXELS = 178_956_970  # the limit of Pillow
_BEGINNINGS = (b"\x02\x00", b"\x08\x00")  # first group of a file without a preamble; no other format begins with it
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
    """Return whether the bytes begin like a DICOM file, with or without a preamble."""
    return data[128:132] == b"DICM" or data[:2] in _BEGINNINGS


def size(data: bytes) -> tuple[int, int]:
    """Return width and height in pixels. Raises DicomError."""
    with _as_dicom_error("it is not a DICOM image"):
        study = _read(data, header_only=True)
        return int(study.Columns), int(study.Rows)


def has_several_frames(data: bytes) -> bool:
    """Return whether there are frames that `decode` does not use. Raises DicomError."""
    with _as_dicom_error("its frames cannot be counted"):
        return int(_read(data, header_only=True).get("NumberOfFrames") or 1) != 1 or _contains_several(_read(data))


def decode(data: bytes) -> Image.Image:
    """Decode the first frame to 8 bits.

    Color is converted to RGB, and deep color is scaled from its stored bits. Gray values pass through the modality LUT
    and the first VOI LUT or window (DICOM PS3.3 C.11), and are inverted for MONOCHROME1 or an inverse presentation LUT
    shape. Without a window, the range from the darkest to the brightest value is used. Padding is black and is excluded
    from this range. Names, dates and identifiers of patients are not part of the result.

    Returns:
        The image in mode L or RGB.

    Raises:
        DicomError: the file cannot be displayed.
    """
    with _as_dicom_error("its pixels cannot be decoded"):
        study = _read(data)
        _set_transfer_syntax(study)
        interpretation = _interpretation(study)
        stream = _checked_code_stream(study)
        if interpretation in _GRAY:
            # pydicom cuts off the bits beyond BitsStored. Those of a code stream are kept, so that they are checked.
            excess = stream is not None and stream.precision > study.BitsStored
            stored = _frame(study, correct_unused_bits=not excess)
            return Image.fromarray(display_values(study, stored, lambda: _frame(study, correct_unused_bits=False)))
        return Image.fromarray(_through_palette(study) if interpretation == _PALETTE else _color(study))


@contextmanager
def _as_dicom_error(what: str) -> Iterator[None]:
    """Turn the exceptions of pydicom into a DicomError with a message of one line."""
    try:
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise DicomError("pydicom is not installed; run pip install pydicom") from error
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
        raise DicomError("it is not a DICOM file with an image: it has no Rows and Columns")
    if not 0 < int(study.Columns) * int(study.Rows) <= _MAX_PIXELS:
        raise DicomError(f"it has {study.Columns} x {study.Rows} pixels; 1 to {_MAX_PIXELS} are supported")
    return study


def _set_transfer_syntax(study: Any) -> None:
    """If the file names no transfer syntax, set the uncompressed one that matches the encoding of its tags."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if study.file_meta.get("TransferSyntaxUID"):
        return
    if "PixelData" in study and study["PixelData"].is_undefined_length:
        raise DicomError("its pixels are compressed, but it has no TransferSyntaxUID")
    implicit, little = study.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    study.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _interpretation(study: Any) -> str:
    """Return the photometric interpretation. Raises DicomError if it is not supported."""
    from pydicom.uid import JPEG2000TransferSyntaxes

    found = str(study.get("PhotometricInterpretation") or "missing").strip()
    known: tuple[str, ...] = (*_GRAY, _PALETTE, *_COLOR)
    if study.file_meta.TransferSyntaxUID in JPEG2000TransferSyntaxes:
        known += _JPEG_2000_COLOR
    if found not in known:
        raise DicomError(f"its PhotometricInterpretation is {found}; supported are {', '.join(known)}")
    samples, wanted = study.get("SamplesPerPixel"), 1 if found in (*_GRAY, _PALETTE) else 3
    if samples != wanted:
        raise DicomError(f"its SamplesPerPixel is {samples}; {found} requires {wanted}")
    if study.get("PixelPresentation") in _SUPPLEMENTAL:
        raise DicomError(f"its PixelPresentation is {study.PixelPresentation}; supplemental palettes are not supported")
    return found


def _color(study: Any) -> np.ndarray:
    """RGB pixels, uint8 [rows, columns, 3]."""
    values = _marked_jpeg(study)
    if values is None:
        values = _frame(study)
    if study.PixelRepresentation != 0:
        raise DicomError("its color values are signed")
    return eight_bit(values, 2 ** int(study.BitsStored) - 1)


def _checked_code_stream(study: Any) -> CodeStream | None:
    """Return the header of the first frame's code stream, or None if there is none.

    Raises:
        DicomError: the bits or the code stream contradict the tags, which would give wrong pixels. Of gray values that
            may have more bits than BitsStored, `display_values` checks whether they do.
    """
    if "PixelData" not in study:
        return None
    stored, high = int(study.BitsStored), int(study.get("HighBit", study.BitsStored - 1))
    if high != stored - 1:
        raise DicomError(f"its HighBit is {high} with BitsStored {stored}; only {stored - 1} is supported")
    compressed = study.file_meta.TransferSyntaxUID.is_compressed
    stream = read_code_stream(_first_frame(study)) if compressed else None
    if stream is None:
        return None
    if (stream.width, stream.height) != (study.Columns, study.Rows):
        raise DicomError(
            f"its code stream has {stream.width} x {stream.height} pixels, not {study.Columns} x {study.Rows}"
        )
    if stream.precision > study.BitsAllocated:
        raise DicomError(f"its code stream has {stream.precision} bits, but BitsAllocated is {study.BitsAllocated}")
    interpretation = study.PhotometricInterpretation.strip()
    if interpretation not in _GRAY and stream.precision != stored:
        raise DicomError(
            f"its code stream has {stream.precision} bits, but BitsStored is {stored}; colors need as many"
        )
    unmarked = _is_lossy_jpeg(study) and stream.components == b"\1\2\3" and not stream.defines_colors
    if unmarked and interpretation == "RGB":
        raise DicomError("its JPEG is declared RGB, but has no JFIF or Adobe marker that distinguishes RGB from YCbCr")
    return stream


def _contains_several(study: Any) -> bool:
    """Return whether the bytes contain more than one frame, because some writers omit NumberOfFrames."""
    from pydicom.encaps import generate_fragments
    from pydicom.pixels.utils import get_expected_length

    if "PixelData" not in study:
        return False
    if study["PixelData"].is_undefined_length:
        return sum(part.startswith((JPEG, JPEG_2000)) for part in generate_fragments(study.PixelData)) > 1
    one = get_expected_length(study)  # bytes, padded by one if odd
    return len(study.PixelData) >= max(one + one % 2 + 1, 2 * one)


def _is_lossy_jpeg(study: Any) -> bool:
    from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

    return study.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit)


def _first_frame(study: Any) -> bytes:
    """Return the compressed bytes of the first frame."""
    from pydicom.encaps import get_frame

    offsets = study.get("ExtendedOffsetTable"), study.get("ExtendedOffsetTableLengths")
    frames = int(study.get("NumberOfFrames") or 1)
    return get_frame(study.PixelData, 0, extended_offsets=offsets if all(offsets) else None, number_of_frames=frames)


def _marked_jpeg(study: Any) -> np.ndarray | None:
    """Return the frame as RGB if it is a JPEG whose Adobe marker states its colors, so that libjpeg converts them.

    pydicom keeps this conversion and applies a second one based on the tags.
    """
    if not _is_lossy_jpeg(study):
        return None
    image = Image.open(io.BytesIO(_first_frame(study)), formats=("JPEG",))
    return np.asarray(image.convert("RGB")) if "adobe_transform" in image.info else None


def _through_palette(study: Any) -> np.ndarray:
    """RGB pixels of a palette image, uint8 [rows, columns, 3]."""
    from pydicom.pixels import apply_color_lut

    require_little_endian(study)
    count, first, bits = study.RedPaletteColorLookupTableDescriptor
    count = count or 1 << 16
    if bits not in (8, 16) or (bits == 8 and count > 256):
        raise DicomError(f"its palette has {count} entries of {bits} bits; supported are 8 bits (up to 256) and 16")
    table = apply_color_lut(np.arange(first, first + count), study)[:, :3]
    # Some writers declare 8-bit entries, each stored in 16 bits, as 16-bit entries.
    table = eight_bit(table, 255 if table.max() <= 255 else 65_535)
    return look_up(table, _frame(study), first)


def _frame(study: Any, **options: Any) -> np.ndarray:
    """Stored values of the first frame, [rows, columns] or [rows, columns, 3]; YBR is already converted to RGB."""
    from pydicom.pixels import pixel_array

    values: np.ndarray = pixel_array(study, index=0, **options)
    return values
