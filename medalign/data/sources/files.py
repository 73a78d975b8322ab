"""Reading a source's files: pictures, JSON, CSV; and splits by a hash of the case, for data sets without one."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from medalign.data.decode import decode_image, has_several_frames, picture_header
from medalign.data.members import MOST_IMAGES
from medalign.data.records import Picture
from medalign.data.samples import BadSample, image_name, naming
from medalign.errors import DataError


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


def read_pictures(folder: Path, names: Any) -> tuple[Picture, ...]:
    """The pictures of one name, or of a list of names in its order, as in `read_picture`. Raises BadSample."""
    listed = names if isinstance(names, list) else [names]
    if len(listed) > MOST_IMAGES:
        raise BadSample(f"image names {len(listed)} pictures; at most {MOST_IMAGES} are read")
    found = []
    for number, name in enumerate(listed):
        with naming(image_name(number, len(listed))):
            found.append(read_picture(folder, name))
    return tuple(found)


def read_picture(folder: Path, name: Any) -> Picture:
    """A picture, as in `as_png_or_jpeg`; `name` is relative to the folder and stays inside it. Raises BadSample."""
    return as_png_or_jpeg(read_bytes(folder, name, "image"))


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
    kind, several = picture_header(data)[0], has_several_frames(data)
    if kind in ("png", "jpg"):
        return Picture(data, "png" if kind == "png" else "jpg", several)
    return Picture(png(decode_image(data)), "png", several)


def png(image: Image.Image) -> bytes:
    """The picture, of a mode that PNG has, as PNG. Raises BadSample."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise BadSample(f"image of mode {image.mode} cannot be written as PNG ({error})") from error
    return buffer.getvalue()


def read_json_list(path: Path) -> list[Any]:
    """A JSON file that holds a list. Raises DataError that names the file."""
    value = read_json(path)
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; a list of samples is needed")
    return value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fetch it again") from error


def read_csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, gzipped or not. Raises DataError for a file without these columns."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            absent = [name for name in columns if name not in (rows.fieldnames or ())]
            if absent:
                raise DataError(f"{path} has no column {absent[0]!r}; its columns are {rows.fieldnames}")
            yield from rows
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def text(value: Any) -> str:
    """Text, or a number as text; white space folded. Anything else is ""."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    return " ".join(str(value).split())


def yes_no_type(answer: str) -> str:
    """ "closed" for a yes or no, else "open"."""
    return "closed" if answer.strip().lower().rstrip(".") in ("yes", "no") else "open"


def share_split(case: str, test_share: float) -> str:
    """ "test" for this share of all cases, else "train"; it depends on the case's name alone."""
    return "test" if unit_hash(case) < test_share else "train"


def unit_hash(name: str) -> float:
    """A number in [0, 1) that belongs to the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def share(value: str) -> float:
    """A share in [0, 1], for settings. Raises ValueError that says so."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return number
