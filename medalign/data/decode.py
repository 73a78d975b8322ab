"""Bytes of an image to pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from medalign.data import dicom
from medalign.data.bad_sample import BadSample
from medalign.data.dicom import is_dicom

_WINDOW = (0.5, 99.5)  # per cent of the pixels
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """The decoded picture, 8 bits a channel.

    A JPEG whose longer side is twice `at_least` or more is decoded at a half, a quarter or an eighth of its size, so
    that its longer side is still `at_least` pixels; 0 decodes it as stored. More than 8 bits of grey are windowed:
    the darkest and the brightest half per cent become black and white. DICOM is shown as its own tags say.

    Raises BadSample if the bytes are no picture or end too early.
    """
    try:
        if is_dicom(data):
            return dicom.picture(data)
        image = Image.open(io.BytesIO(data))
        if at_least and image.format in ("JPEG", "MPO"):
            longer = max(image.size)
            width, height = (max(1, -(-side * at_least // longer)) for side in image.size)
            image.draft(None, (width, height))
        image.load()
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({_reason(error)})") from error
    return _eight_bit(image) if image.mode.startswith(("I", "F")) else image


def _reason(error: Exception) -> str:
    """Pillow names the object in memory where it knows no format, which differs from run to run."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = np.percentile(values, _WINDOW)
    if low == high:  # almost all of one value; what differs from it must stay visible
        low, high = values.min(), values.max()
    shown = (values.clip(low, high) - low) * (255 / max(float(high - low), 1e-6))
    return Image.fromarray(np.rint(shown).astype(np.uint8))


def picture_header(data: bytes) -> tuple[str, int, int]:
    """Format ("png", "jpg" or "dcm"), width and height of a picture, without decoding its pixels."""
    try:
        if is_dicom(data):
            return "dcm", *dicom.picture_size(data)
        with Image.open(io.BytesIO(data)) as image:
            name, (width, height) = image.format or "unknown", image.size
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({_reason(error)})") from error
    if name not in ("PNG", "JPEG", "MPO"):
        raise BadSample(f"image is {name}; only PNG, JPEG and DICOM are read")
    return ("png" if name == "PNG" else "jpg"), width, height
