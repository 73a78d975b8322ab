"""Gray DICOM pixels: from stored values to display values (PS3.3 C.11). A study is a pydicom data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_TAGS = (
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
)
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


class DicomError(ValueError):
    """The bytes do not contain an image that can be displayed."""


def display_values(study: Any, stored: np.ndarray, with_unused_bits: Callable[[], np.ndarray]) -> np.ndarray:
    """Convert stored values to gray values for display.

    Args:
        study: the tags.
        stored: stored values, [rows, columns].
        with_unused_bits: returns the stored values including the bits beyond BitsStored.

    Returns:
        Gray values, uint8 [rows, columns].

    Raises:
        DicomError: a tag has an unsupported value, or pixels are not finite or have more bits than BitsStored.
    """
    padding = _padding(study, stored, with_unused_bits)
    _check_range(study, stored[~padding])
    tags = _tags(study)
    values = _rescaled(study, tags, stored)
    visible = values[~padding]
    if not np.isfinite(visible).all():
        raise DicomError(f"{np.count_nonzero(~np.isfinite(visible))} of its pixels are not finite (NaN or infinite)")
    gray = eight_bit(_windowed(study, tags, np.where(padding, 0, values), visible), 1)
    if study.PhotometricInterpretation.strip() == "MONOCHROME1" or _is_inverse(study):
        gray = 255 - gray
    gray[padding] = 0
    return gray


def eight_bit(values: np.ndarray, top: float) -> np.ndarray:
    """Scale values from [0, top] to [0, 255], uint8."""
    return np.rint(values * (255 / top)).clip(0, 255).astype(np.uint8)


def _stored_value(value: Any, stored: np.ndarray) -> Any:
    """Convert the value of a tag to the pixel type; for example, some writers store -2000 as 63536, or vice versa."""
    bits = 8 * stored.dtype.itemsize
    if stored.dtype.kind not in "iu" or not -(1 << bits - 1) <= value < 1 << bits:
        return value
    return np.array(value, dtype=np.int64).astype(stored.dtype).item()


def look_up(entries: np.ndarray, stored: np.ndarray, first: Any) -> np.ndarray:
    """Replace stored values by the entries of a lookup table; values outside of it take its first or last entry.

    Args:
        entries: the table, [n] or [n, 3].
        stored: stored values, [rows, columns].
        first: the tag with the stored value of the first entry.
    """
    positions: np.ndarray = stored.astype(np.int64) - _stored_value(first, stored)
    return np.take(entries, positions, axis=0, mode="clip")


def require_little_endian(study: Any) -> None:
    """Raise DicomError if a lookup table is stored in big-endian order."""
    if not study.file_meta.TransferSyntaxUID.is_little_endian:
        raise DicomError("it has a lookup table in big-endian order, which is not supported")


def _padding(study: Any, stored: np.ndarray, with_unused_bits: Callable[[], np.ndarray]) -> np.ndarray:
    """Mask of the padding around the image, bool [rows, columns]."""
    kind = next((kind for kind in ("Float", "DoubleFloat") if f"{kind}PixelData" in study), "")
    value, limit = (study.get(f"{kind}PixelPadding{end}") for end in ("Value", "RangeLimit"))
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    ends = sorted(_stored_value(end, stored) for end in (value, value if limit is None else limit))
    if not kind and not _fits(ends, int(study.BitsStored), stored.dtype.kind == "i"):
        stored = with_unused_bits()
    padding: np.ndarray = (stored >= ends[0]) & (stored <= ends[1])
    return padding


def _check_range(study: Any, visible: np.ndarray) -> None:
    """Raise DicomError for a value beyond BitsStored; a code stream of more bits may contain one."""
    if "PixelData" not in study or not visible.size:
        return
    ends = [visible.min().item(), visible.max().item()]
    if not _fits(ends, int(study.BitsStored), visible.dtype.kind == "i"):
        raise DicomError(f"its values are from {ends[0]} to {ends[1]}, which BitsStored {study.BitsStored} cannot hold")


def _fits(ends: list[Any], bits: int, signed: bool) -> bool:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return bool(ends[0] >= low and ends[1] <= high)


def _tags(study: Any) -> dict[str, Any]:
    """Tags for the display of the first frame; enhanced files store them in functional groups."""
    tags = {name: study.get(name) for name in _TAGS}
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (study.get(groups) or [])[:1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in (group.get(macro) or [])[:1]:
                    tags |= {name: item.get(name) for name in _TAGS if name in item}
    return tags


def _rescaled(study: Any, tags: dict[str, Any], stored: np.ndarray) -> np.ndarray:
    """Values that windows refer to (PS3.3 C.11.1), float64 [rows, columns]."""
    if tags["ModalityLUTSequence"]:
        entries, first, _ = _lookup_table(study, tags["ModalityLUTSequence"][0])
        return look_up(entries, stored, first)
    slope, intercept = tags["RescaleSlope"], tags["RescaleIntercept"]
    rescaled: np.ndarray = stored.astype(np.float64) * float(1 if slope is None else slope) + float(intercept or 0)
    return rescaled


def _windowed(study: Any, tags: dict[str, Any], values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Values from 0 (black) to 1 (white) (PS3.3 C.11.2), before any inversion."""
    shown: np.ndarray
    if tags["VOILUTSequence"]:
        entries, first, bits = _lookup_table(study, tags["VOILUTSequence"][0])
        if first > 32_767 and visible.size and visible.min() < 0:
            first -= 1 << 16  # the rescaled values are signed, but the tag was read as unsigned like the stored values
        shown = entries[np.rint(values - first).clip(0, len(entries) - 1).astype(np.int64)] / (2**bits - 1)
        return shown
    if tags["WindowCenter"] in (None, "") or tags["WindowWidth"] in (None, ""):
        low, high = (visible.min(), visible.max()) if visible.size else (0.0, 0.0)
        shown = (values.clip(low, high) - low) / (high - low or 1)
        return shown
    center, width = (float(np.atleast_1d(tags[name])[0]) for name in ("WindowCenter", "WindowWidth"))
    function = str(tags["VOILUTFunction"] or "LINEAR").strip().upper()
    if function not in _FUNCTIONS:
        raise DicomError(f"its VOILUTFunction is {function}; supported are {', '.join(_FUNCTIONS)}")
    if not (np.isfinite([center, width]).all() and (width >= 1 if function == "LINEAR" else width > 0)):
        least = "at least 1" if function == "LINEAR" else "more than 0"
        raise DicomError(f"its window has center {center:g} and width {width:g}; {function} needs a width of {least}")
    if function == "SIGMOID":
        shown = 1 / (1 + np.exp((-4 * (values - center) / width).clip(-99, 99)))
        return shown
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    shown = ((values - center) / width + 0.5).clip(0, 1) if width else (values > center).astype(np.float64)
    return shown


def _lookup_table(study: Any, item: Any) -> tuple[np.ndarray, int, int]:
    """Entries as float64, value of the first entry, and bits per entry."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    data, count = item.LUTData, count or 1 << 16
    if isinstance(data, bytes):
        require_little_endian(study)
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * count else "u1")
    entries = np.atleast_1d(np.array(data, dtype=np.float64))[:count]
    if not 8 <= bits <= 16 or len(entries) < count or entries.max() >= 2**bits:
        raise DicomError(
            f"its lookup table has {len(entries)} entries up to {entries.max():g}, not {count} of 8 to 16 bits ({bits})"
        )
    return entries, first, bits


def _is_inverse(study: Any) -> bool:
    shape = str(study.get("PresentationLUTShape") or "IDENTITY").strip().upper()
    if shape not in ("IDENTITY", "INVERSE") or "PresentationLUTSequence" in study:
        raise DicomError(f"its presentation LUT has the shape {shape}, or entries; supported are IDENTITY and INVERSE")
    return shape == "INVERSE"
