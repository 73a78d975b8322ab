"""DICOM pictures as a radiologist's screen shows them; of all tags, only those that say how to show pixels are used.

The only file that imports pydicom, which is optional.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image


class DicomError(ValueError):
    """These bytes hold no picture that can be shown."""


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does."""
    return data[128:132] == b"DICM"


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height. Raises DicomError."""
    study = _read(data, header_only=True)
    return int(study.Columns), int(study.Rows)


def picture(data: bytes) -> Image.Image:
    """The (first) frame, 8 bits: stored values, modality LUT, window or VOI LUT, MONOCHROME1 turned over.

    Without a window of its own, the picture is spread from its darkest to its brightest value. Names, dates and numbers
    of patients stay in the bytes: nothing of them comes with the picture. Raises DicomError.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    study = _read(data)
    try:
        values = study.pixel_array
        if int(study.get("NumberOfFrames", 1) or 1) > 1:
            values = values[0]
        if study.get("SamplesPerPixel", 1) == 3:
            return _colour(study, values)
        values = apply_modality_lut(values, study)
        window = _window(study)
        shown = (values if window else apply_voi_lut(values, study)).astype(np.float32)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError, KeyError, struct.error) as error:
        raise DicomError(f"its pixels cannot be decoded ({error})") from error
    low, high = window or (float(shown.min()), float(shown.max()))
    grey = np.rint((shown.clip(low, high) - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return Image.fromarray(255 - grey if study.get("PhotometricInterpretation") == "MONOCHROME1" else grey)


def to_png(data: bytes) -> bytes:
    """The picture as a PNG without any tag, to be packed instead of the DICOM file. Raises DicomError."""
    buffer = io.BytesIO()
    picture(data).save(buffer, "PNG")
    return buffer.getvalue()


def _window(study: Any) -> tuple[float, float] | None:
    """The values that become black and white (DICOM PS3.3 C.11.2.1.2); None where the file names none or a table."""
    if "VOILUTSequence" in study or study.get("WindowCenter") in (None, "") or study.get("WindowWidth") in (None, ""):
        return None
    centre, width = (float(np.atleast_1d(study.get(name))[0]) for name in ("WindowCenter", "WindowWidth"))
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _colour(study: Any, values: np.ndarray) -> Image.Image:
    from pydicom.pixels import convert_color_space

    interpretation = study.PhotometricInterpretation
    if interpretation.startswith("YBR"):
        values = convert_color_space(values, interpretation, "RGB")
    return Image.fromarray(values.astype(np.uint8), "RGB")


def _read(data: bytes, header_only: bool = False) -> Any:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise DicomError("pydicom is not installed; pip install pydicom") from error
    try:
        study = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=header_only)
        _ = study.Columns, study.Rows
    except (InvalidDicomError, AttributeError, EOFError, OSError, ValueError, struct.error) as error:
        raise DicomError(f"it is no DICOM picture ({error})") from error
    return study
