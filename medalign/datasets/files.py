"""Access to the folder of a data set: find missing files, and read images."""

from __future__ import annotations

import io
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from medalign.data.samples.decode import SEVERAL_FRAMES, decode_image, has_several_frames, picture_header
from medalign.data.samples.sample import BadSample, image_name, sample_context
from medalign.data.shards.members import MAX_IMAGES
from medalign.data.shards.records import Picture
from medalign.datasets.texts import is_missing


def missing_paths(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Return one line per path that is missing in the folder.

    Args:
        folder: the folder of the data set.
        wanted: maps each path to a description; "a|b" means either.
    """
    return [
        f"{names.replace('|', ' or ')}: {what}"
        for names, what in wanted.items()
        if not any((folder / name).exists() for name in names.split("|"))
    ]


def first_folder(folder: Path, *names: str) -> Path:
    """Return the first of these folders that exists, or the first one if none exists."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def read_pictures(folder: Path, names: Any, fallback: Path | None = None) -> tuple[Picture, ...]:
    """Read one image, or a list of images in order, as in `read_picture`.

    Args:
        folder: the folder that contains the images.
        names: a path relative to the folder, or a list of paths.
        fallback: searched if a file cannot be read in `folder`; some data sets name "images/a.jpg" relative to the
            parent of images/.

    Raises:
        BadSample: an image cannot be read.
    """
    listed = names if isinstance(names, list) else [names]
    if len(listed) > MAX_IMAGES:
        raise BadSample(f"image names {len(listed)} files; at most {MAX_IMAGES} are read")
    found = []
    for index, name in enumerate(listed):
        with sample_context(image_name(index, len(listed))):
            found.append(_read_either(folder, fallback, name))
    return tuple(found)


def _read_either(folder: Path, fallback: Path | None, name: Any) -> Picture:
    try:
        return read_picture(folder, name)
    except BadSample as error:
        try:
            if fallback is None:
                raise
            return read_picture(fallback, name)
        except BadSample:
            raise error from None


def read_picture(folder: Path, name: Any) -> Picture:
    """Read an image as in `as_png_or_jpeg`. `name` is relative to the folder and must stay inside. Raises BadSample."""
    return as_png_or_jpeg(read_bytes(folder, name, "image"))


def require_name(row: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a row whose `field` has the path of an image. Raises BadSample if it has none."""
    name = row.get(field)
    if is_missing(name):
        raise BadSample(f"the question has no {field}")
    if not isinstance(name, str):
        raise BadSample(f"{field} is {reprlib.repr(name)}, which is not a path")
    return row


def read_bytes(folder: Path, name: Any, role: str) -> bytes:
    """Read a file.

    Args:
        folder: the folder of the data set.
        name: a path relative to the folder.
        role: what the file is, for the message.

    Raises:
        BadSample: the name is not text or leads out of the folder, or the file cannot be read.
    """
    if not isinstance(name, str) or not name:
        raise BadSample(f"{role} is {name!r}; it must be a path relative to the folder")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise BadSample(f"{role} {name!r} is outside the folder")
        return path.read_bytes()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # also a loop of links, and invalid characters
        raise BadSample(f"{role} {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def as_png_or_jpeg(data: bytes) -> Picture:
    """Keep PNG and JPEG bytes unchanged, and convert other supported formats (BMP, TIFF, ...) to 8-bit PNG."""
    kind = picture_header(data)[0]
    notes = (SEVERAL_FRAMES,) if has_several_frames(data) else ()
    if kind in ("png", "jpg"):
        return Picture(data, "png" if kind == "png" else "jpg", notes)
    return Picture(png(decode_image(data)), "png", notes)


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG. Raises BadSample if PNG does not support its mode."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise BadSample(f"image of mode {image.mode} cannot be written as PNG ({error})") from error
    return buffer.getvalue()
