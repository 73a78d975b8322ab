"""Decode images as an image viewer shows them: upright, opaque, 8 bits per channel.

Packing, indexing, training and inference all read images with this module, so that sizes, boxes and masks refer to the
same pixels everywhere. Only the formats in `FORMATS` and DICOM are opened: some other Pillow plugins start programs.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from medalign.data.samples import dicom
from medalign.data.samples.bad_sample import BadSample
from medalign.data.samples.dicom import is_dicom
from medalign.data.samples.git_lfs import describe_pointer

# Pillow's name of each supported format -> file extension
FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG that contains further ones
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}
SEVERAL_FRAMES = "an image has several frames and only the first is used; export single frames to choose another"
PILLOW_FORMATS = tuple(name for name in FORMATS if name != "MPO")  # opened by the JPEG plugin

_UNSIGNED, _SIGNED = 1, 2  # TIFF sample formats
_PNG = b"\x89PNG"
_WINDOW = (0.5, 99.5)  # percentiles of the pixels
_GRAY = ("1", "L", "LA", "La")
_COLOR = ("CMYK", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # markers of a PNG with an orientation
_ORIENTATION = ExifTags.Base.Orientation
_TRANSPOSED = range(5, 9)  # orientations that swap width and height
_UNDECODABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """Decode an image and apply its EXIF orientation.

    A JPEG whose longer side is at least twice `at_least` is decoded at 1/2, 1/4 or 1/8 of its size, so that its longer
    side still has `at_least` pixels. Gray images with more than 8 bits are windowed: the darkest and the brightest
    0.5 % of the pixels become black and white. DICOM is displayed as its tags specify. Transparent areas are shown on
    white, as in an image viewer or a browser, because the colors below them are arbitrary. Of several frames, the first
    is used.

    Args:
        data: the encoded image.
        at_least: pixels that the longer side needs; 0 decodes at full size.

    Returns:
        The image in mode L or RGB.

    Raises:
        BadSample: the bytes are not a complete image of a supported format, or the pixels cannot be displayed.
    """
    with _bad_sample(data):
        if is_dicom(data):
            return dicom.decode(data)
        image = _open(data)
        if at_least and image.format in ("JPEG", "MPO"):
            longer = max(image.size)
            width, height = (max(1, -(-side * at_least // longer)) for side in image.size)
            image.draft(None, (width, height))
        return _to_gray_or_rgb(_upright(image), _TiffTags.of(image))


def decode_mask(data: bytes) -> Image.Image:
    """Decode a mask upright, without any other change to values, palette or transparency. Raises BadSample."""
    with _bad_sample(data):
        return _upright(_open(data))


def picture_header(data: bytes) -> tuple[str, int, int]:
    """Read the header of an image.

    Pixels are only decoded for a PNG that may store its orientation after them.

    Returns:
        The extension of the format (a value of `FORMATS`, or "dcm"), and width and height of the upright image.

    Raises:
        BadSample: the bytes are not an image of a supported format.
    """
    with _bad_sample(data):
        if is_dicom(data):
            return "dcm", *dicom.size(data)
        with _open(data) as image:
            kind, size = FORMATS[image.format or ""], image.size
            if kind == "png" and not any(mark in data for mark in _PNG_ORIENTATION):
                return kind, *size
            # Pillow has already swapped the sides of a TIFF with this tag.
            swapped = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION) in _TRANSPOSED
            return kind, *(size[::-1] if _orientation(image) in _TRANSPOSED and not swapped else size)


def has_several_frames(data: bytes) -> bool:
    """Return whether the file contains frames after the first one, which is the only one used. Raises BadSample."""
    with _bad_sample(data):
        if is_dicom(data):
            return dicom.has_several_frames(data)
        with _open(data) as image:
            return bool(getattr(image, "is_animated", False))


@contextmanager
def _bad_sample(data: bytes) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        if description := describe_pointer(data):
            raise BadSample(f"image is {description}") from error
        # The message of Pillow contains the address of an object, which differs from run to run.
        names = ", ".join((*PILLOW_FORMATS, "DICOM"))
        raise BadSample(f"image cannot be decoded (it has none of the supported formats: {names})") from error
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({error or type(error).__name__})") from error


def _open(data: bytes) -> Image.Image:
    """Open an image without reading its pixels. Raises BadSample for pixel types that would be decoded incorrectly."""
    if data.startswith(_PNG) and data[24:26] == b"\x10\x04":  # bit depth and color type
        raise BadSample("image is 16-bit gray with transparency, which is not supported; save it without transparency")
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    known = image.mode in (*_GRAY, *_COLOR, *_DEEP)
    signed = image.mode == "L" and _TiffTags.of(image).sample_format == _SIGNED
    if signed or not known:
        mode = f"signed {image.mode}" if signed else image.mode
        raise BadSample(f"image has pixels of mode {mode}, which is not supported; save it as gray or RGB")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8. Like in image viewers, unreadable EXIF data is ignored."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (LookupError, SyntaxError, TypeError, ValueError, struct.error):
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


class _TiffTags(NamedTuple):
    """TIFF tags that affect the pixel values but are not applied by Pillow."""

    white_is_zero: bool = False
    sample_format: int = 0  # 1 unsigned, 2 signed, 3 float; 0 for other formats

    @classmethod
    def of(cls, image: Image.Image) -> _TiffTags:
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            return cls()
        tags = image.tag_v2
        interpretation = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        return cls(interpretation == 0, max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))))


def _to_gray_or_rgb(image: Image.Image, tags: _TiffTags) -> Image.Image:
    """Convert to mode L or RGB."""
    if image.mode in _DEEP:
        return _windowed(image, tags)
    if image.has_transparency_data:
        return _on_white(image)
    wanted = "L" if image.mode in _GRAY else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _on_white(image: Image.Image) -> Image.Image:
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # undo the premultiplied alpha
    layer = (image.convert(straight) if straight else image).convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return shown.convert("RGB").convert("L") if image.mode in _GRAY else shown.convert("RGB")


def _windowed(image: Image.Image, tags: _TiffTags) -> Image.Image:
    stored = np.asarray(image)
    if stored.dtype == np.int32 and tags.sample_format == _UNSIGNED:
        stored = stored.view(np.uint32)
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise BadSample(f"image has {count} pixels that are not finite (NaN or infinite)")
    hidden = values == image.info.get("transparency", np.nan)
    visible = values[~hidden] if hidden.any() and not hidden.all() else values
    low, high = np.percentile(visible, _WINDOW)
    if low == high:  # almost all pixels have one value; the others must stay visible
        low, high = visible.min(), visible.max()
    shown = (values.clip(low, high) - low) * (255 / (float(high - low) or 1))
    gray = np.rint(255 - shown if tags.white_is_zero else shown).astype(np.uint8)
    gray[hidden] = 255
    return Image.fromarray(gray)
