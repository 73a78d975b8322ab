"""A folder with `annotations.jsonl` and pictures, to shards: the plain format that any data set can be brought into.

One JSON object a line. Beside the fields of a sample (see `shards`) it has:

    id     the sample's key, unique
    image  path of a PNG or JPEG file, relative to the folder; null for a question without image
    mask   path of a PNG of the image's size; may be left out or ""
    split  each split becomes its own shard folder, OUTPUT/<split>; "train" where it is left out

A line that cannot be used is refused by name with its number, and the others are packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from medalign.data.samples import BadSample
from medalign.data.shards import PackReport, Record, Refused, write_shards
from medalign.errors import DataError

ANNOTATIONS = "annotations.jsonl"
DEFAULT_SPLIT = "train"

_FORMATS: dict[str, Literal["png", "jpg"]] = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}


def pack(
    input: Path,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
) -> dict[str, PackReport]:
    """Pack each split of the folder into `output/<split>`; lines without a readable split are listed with the first.

    Raises DataError for a folder without annotations, or a split without one valid sample.
    """
    counts = splits(Path(input))
    names = [name for name in counts if name is not None]
    if not names:
        raise DataError(f"{Path(input) / ANNOTATIONS} holds no readable line; it needs one JSON object a line")
    reports = {}
    for name in names:
        chosen = records(Path(input), name, with_unreadable=name == names[0])
        reports[name] = write_shards(
            chosen, Path(output) / name, samples_per_shard=samples_per_shard, progress=progress
        )
    return reports


def splits(folder: Path) -> dict[str | None, int]:
    """Lines of each split, in the order they first occur; None counts the unreadable lines."""
    counts: dict[str | None, int] = {}
    for _, row in _lines(folder):
        split = None if isinstance(row, BadSample) else _split(row)
        counts[split] = counts.get(split, 0) + 1
    return counts


def records(folder: Path, split: str | None, *, with_unreadable: bool = True) -> Iterator[Record | Refused]:
    """The records of one split, or of all (None), in the order of the lines; what cannot be one is a `Refused`.

    Args:
        with_unreadable: list the lines too of which not even the split can be read.
    """
    for number, row in _lines(folder):
        place = f"{ANNOTATIONS} line {number}"
        if isinstance(row, BadSample):
            if with_unreadable:
                yield Refused(place, str(row))
        elif split is None or _split(row) == split:
            try:
                yield _record(folder, row)
            except BadSample as error:
                yield Refused(f"{place} ({row.get('id', 'no id')})", str(error))


def _lines(folder: Path) -> Iterator[tuple[int, dict[str, Any] | BadSample]]:
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise DataError(f"{path} does not exist; the folder needs one JSON object a line in {ANNOTATIONS}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | BadSample:
    try:
        row = json.loads(line)
    except ValueError as error:
        return BadSample(f"not JSON ({error})")
    if not isinstance(row, dict):
        return BadSample(f"a JSON {type(row).__name__}, not an object")
    split = _split(row)
    if not isinstance(split, str) or not split.strip(".") or "/" in split or "\\" in split:
        return BadSample(f"split is {split!r}; it names a folder, such as 'train'")
    return row


def _split(row: dict[str, Any]) -> Any:
    return row.get("split") or DEFAULT_SPLIT


def _record(folder: Path, row: dict[str, Any]) -> Record:
    key = row.get("id")
    if not isinstance(key, str) or not key:
        raise BadSample(f"id is {key!r}; each line needs a text that is its own")
    if "image" not in row:
        raise BadSample("no image is named; write null for a question without image")
    image = row["image"]
    mask = _read(folder, row["mask"], "mask") if row.get("mask") else None
    if image is None:
        return Record(key, None, "png", row, mask)
    data = _read(folder, image, "image")
    return Record(key, data, _FORMATS[Path(image).suffix.lower()], row, mask)


def _read(folder: Path, name: Any, role: str) -> bytes:
    if not isinstance(name, str) or Path(name).suffix.lower() not in _FORMATS:
        raise BadSample(f"{role} is {name!r}; a path ending in .png, .jpg or .jpeg is needed")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadSample(f"{role} {name} lies outside the folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"{role} {name} cannot be read: {error.strerror}") from error
