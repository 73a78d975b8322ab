"""Bytes of an image to pixels as a viewer shows them: upright, opaque, 8 bits a channel.

Packing, index, training and answering all read images here, so that sizes, boxes and masks mean the same pixels
everywhere. Only the formats of `FORMATS`, and DICOM, are ever opened: some of Pillow's other plugins start programs.
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

from medalign.data import dicom
from medalign.data.bad_sample import BadSample
from medalign.data.dicom import is_dicom
from medalign.data.packings import pointer

# Pillow's name of each format that is read -> the ending of its files
FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG that holds further ones
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}
SEVERAL_FRAMES = "a picture has several frames, of which the first is shown; name single frames to choose another"
PILLOW_FORMATS = tuple(name for name in FORMATS if name != "MPO")  # which the plugin of JPEG opens

_UNSIGNED, _SIGNED = 1, 2  # sample formats of TIFF
_PNG = b"\x89PNG"
_WINDOW = (0.5, 99.5)  # per cent of the pixels
_GRAY = ("1", "L", "LA", "La")
_COLOR = ("CMYK", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # what a PNG with an orientation holds
_ORIENTATION = ExifTags.Base.Orientation
_TURNED = range(5, 9)  # orientations that exchange width and height
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
    """The decoded image, mode L or RGB, upright: its EXIF orientation is applied.

    A JPEG whose longer side is twice `at_least` or more is decoded at a half, a quarter or an eighth of its size, so
    that its longer side is still `at_least` pixels; 0 decodes it as stored. More than 8 bits of gray are windowed:
    the darkest and the brightest half per cent become black and white. DICOM is shown as its own tags say. What is
    transparent is shown on white, as on the page of a viewer or browser; the colors hidden below it are arbitrary.
    Of several frames the first is shown.

    Raises BadSample if the bytes are not an image of a format in `FORMATS` or DICOM, end too early, or hold pixels
    that cannot be shown.
    """
    with _bad_sample(data):
        if is_dicom(data):
            return dicom.picture(data)
        image = _open(data)
        if at_least and image.format in ("JPEG", "MPO"):
            longer = max(image.size)
            width, height = (max(1, -(-side * at_least // longer)) for side in image.size)
            image.draft(None, (width, height))
        return _plain(_upright(image), _Tags.of(image))


def decode_mask(data: bytes) -> Image.Image:
    """A mask as stored, upright: values, palette indices and transparency are left as they are. Raises BadSample."""
    with _bad_sample(data):
        return _upright(_open(data))


def picture_header(data: bytes) -> tuple[str, int, int]:
    """Ending of the format (a value of `FORMATS`, or "dcm"), and width and height of the upright image.

    Pixels are decoded only where a PNG may keep its orientation behind them. Raises BadSample.
    """
    with _bad_sample(data):
        if is_dicom(data):
            return "dcm", *dicom.picture_size(data)
        with _open(data) as image:
            kind, size = FORMATS[image.format or ""], image.size
            if kind == "png" and not any(mark in data for mark in _PNG_ORIENTATION):
                return kind, *size
            # By the tag itself, Pillow has exchanged the sides of a TIFF already.
            told = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION) in _TURNED
            return kind, *(size[::-1] if _orientation(image) in _TURNED and not told else size)


def has_several_frames(data: bytes) -> bool:
    """Whether the file holds frames beside the first, which is the one that is shown. Raises BadSample."""
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
        if told := pointer(data):
            raise BadSample(f"image is {told}") from error
        # Pillow names the object in memory, which differs from run to run.
        names = ", ".join((*PILLOW_FORMATS, "DICOM"))
        raise BadSample(f"image cannot be decoded (of no format that is read: {names})") from error
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({error or type(error).__name__})") from error


def _open(data: bytes) -> Image.Image:
    """The image, its pixels not read yet. Raises BadSample for kinds of pixels that would come out wrong."""
    if data.startswith(_PNG) and data[24:26] == b"\x10\x04":  # bits a channel, and kind of color
        raise BadSample("image has 16 bits of gray with transparency, which is not read; save it without transparency")
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    known = image.mode in (*_GRAY, *_COLOR, *_DEEP)
    signed = image.mode == "L" and _Tags.of(image).sample_format == _SIGNED
    if signed or not known:
        mode = f"{image.mode} with a sign" if signed else image.mode
        raise BadSample(f"image has pixels of mode {mode}, which are not read; save it as gray or RGB")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8. EXIF that cannot be read says nothing, as to any viewer."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (LookupError, SyntaxError, TypeError, ValueError, struct.error):
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


class _Tags(NamedTuple):
    """What the tags of a TIFF say of its values, and Pillow leaves to its users."""

    white_is_zero: bool = False
    sample_format: int = 0  # 1 unsigned, 2 signed, 3 float; 0 of other files

    @classmethod
    def of(cls, image: Image.Image) -> _Tags:
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            return cls()
        tags = image.tag_v2
        interpretation = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        return cls(interpretation == 0, max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))))


def _plain(image: Image.Image, tags: _Tags) -> Image.Image:
    """Mode L or RGB."""
    if image.mode in _DEEP:
        return _windowed(image, tags)
    if image.has_transparency_data:
        return _on_white(image)
    wanted = "L" if image.mode in _GRAY else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _on_white(image: Image.Image) -> Image.Image:
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # from colors that are multiplied by their opacity
    layer = (image.convert(straight) if straight else image).convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return shown.convert("RGB").convert("L") if image.mode in _GRAY else shown.convert("RGB")


def _windowed(image: Image.Image, tags: _Tags) -> Image.Image:
    stored = np.asarray(image)
    if stored.dtype == np.int32 and tags.sample_format == _UNSIGNED:
        stored = stored.view(np.uint32)
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise BadSample(f"image has {count} pixels that are not numbers (NaN or infinite)")
    hidden = values == image.info.get("transparency", np.nan)
    visible = values[~hidden] if hidden.any() and not hidden.all() else values
    low, high = np.percentile(visible, _WINDOW)
    if low == high:  # almost all of one value; what differs from it must stay visible
        low, high = visible.min(), visible.max()
    shown = (values.clip(low, high) - low) * (255 / (float(high - low) or 1))
    gray = np.rint(255 - shown if tags.white_is_zero else shown).astype(np.uint8)
    gray[hidden] = 255
    return Image.fromarray(gray)
