"""A source's folder: what it lacks, and reading its pictures."""

from __future__ import annotations

import io
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from medalign.data.samples.decode import SEVERAL_FRAMES, decode_image, has_several_frames, picture_header
from medalign.data.samples.sample import BadSample, image_name, sample_context
from medalign.data.shards.members import MOST_IMAGES
from medalign.data.shards.records import Picture
from medalign.datasets.texts import is_missing


def lacking(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """One line for each path of `wanted` (path to what it holds) that the folder lacks; "a|b" means either."""
    return [
        f"{names.replace('|', ' or ')}: {what}"
        for names, what in wanted.items()
        if not any((folder / name).exists() for name in names.split("|"))
    ]


def first_folder(folder: Path, *names: str) -> Path:
    """The first of these folders that exists, else the first."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def read_pictures(folder: Path, names: Any, fallback: Path | None = None) -> tuple[Picture, ...]:
    """The pictures of one name, or of a list of names in its order, as in `read_picture`. Raises BadSample.

    What cannot be read in the folder is looked for in the folder `fallback`: some name "images/a.jpg" beside images/.
    """
    listed = names if isinstance(names, list) else [names]
    if len(listed) > MOST_IMAGES:
        raise BadSample(f"image names {len(listed)} pictures; at most {MOST_IMAGES} are read")
    found = []
    for number, name in enumerate(listed):
        with sample_context(image_name(number, len(listed))):
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
    """A picture, as in `as_png_or_jpeg`; `name` is relative to the folder and stays inside it. Raises BadSample."""
    return as_png_or_jpeg(read_bytes(folder, name, "image"))


def require_name(row: Mapping[str, Any], field: str) -> str:
    """The path of a picture that a question names under `field`. Raises BadSample for one that names none."""
    name = row.get(field)
    if is_missing(name):
        raise BadSample(f"no question with {field}")
    if not isinstance(name, str):
        raise BadSample(f"{field} is {reprlib.repr(name)}, not a path")
    return name


def read_bytes(folder: Path, name: Any, role: str) -> bytes:
    """A file's bytes. Raises BadSample for a name that is no text, leads out of the folder or cannot be read."""
    if not isinstance(name, str) or not name:
        raise BadSample(f"{role} is {name!r}; a path relative to the folder is needed")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise BadSample(f"{role} {name!r} lies outside the folder")
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, and a NUL or half a character in the name
        raise BadSample(f"{role} {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def as_png_or_jpeg(data: bytes) -> Picture:
    """PNG and JPEG bytes as they came; other formats that are read (BMP, TIFF, ...) become 8-bit PNG."""
    kind = picture_header(data)[0]
    notes = (SEVERAL_FRAMES,) if has_several_frames(data) else ()
    if kind in ("png", "jpg"):
        return Picture(data, "png" if kind == "png" else "jpg", notes)
    return Picture(png(decode_image(data)), "png", notes)


def png(image: Image.Image) -> bytes:
    """The picture, of a mode that PNG has, as PNG. Raises BadSample."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise BadSample(f"image of mode {image.mode} cannot be written as PNG ({error})") from error
    return buffer.getvalue()
