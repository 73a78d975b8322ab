"""A folder with `annotations.jsonl` and pictures: the plain format that any data set can be brought into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.sources.files import lacking, read_bytes, read_pictures
from medalign.data.sources.source import Chosen, Item, Source

ANNOTATIONS = "annotations.jsonl"
DEFAULT_SPLIT = "train"

LAYOUT = """\
annotations.jsonl   one JSON object a line
the pictures and masks that it names, by paths relative to the folder

fields of a line:
  id           the sample's key, unique
  image        path of a picture, or a list of paths in order; null for a question without image; of a picture with
               several frames (TIFF, GIF, DICOM, ...) the first is shown, and conversion.json names it
  task         "vqa" or "report"
  question     what is asked; needed for vqa
  answer       needed for vqa
  answer_type  "closed", "open" or "", in letters of any size
  report       the text to be written; needed for report
  boxes        [[x0, y0, x1, y1], ...] in pixels of the (first) image as viewers show it, upright; may be left out
  mask         path of a PNG of the (first) image's size; may be left out or ""
  split        its own shard folder, named by letters, digits, "_" and "-"; "train" where it is left out or ""
Other fields are kept as the sample's metadata."""


def missing(folder: Path, _chosen: Chosen) -> list[str]:
    return lacking(folder, {ANNOTATIONS: "one JSON object a line"})


def items(folder: Path, _chosen: Chosen) -> Iterator[Item | Refused]:
    """One item a line; a line that cannot be read is refused with its number."""
    with (folder / ANNOTATIONS).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{ANNOTATIONS} line {number}"
            try:
                row = _parse(line)
                yield Item(row.get("split") or DEFAULT_SPLIT, row["id"], _folded(row))
            except BadSample as error:
                yield Refused(place, str(error))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadSample(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadSample(f"a JSON {type(row).__name__}, not an object")
    split = row.get("split")
    if split is not None and not isinstance(split, str):
        raise BadSample(f"split is {split!r}; it names a folder, such as 'train'")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise BadSample(f"id is {row.get('id')!r}; each line needs a text that is its own")
    return row


def _folded(row: dict[str, Any]) -> dict[str, Any]:
    """With its answer type in small letters: many write CLOSED or Open."""
    given = row.get("answer_type")
    return {**row, "answer_type": given.strip().lower()} if isinstance(given, str) else row


def record(folder: Path, item: Item, _chosen: Chosen) -> Record:
    row = item.data
    if "image" not in row:
        raise BadSample("no image is named; write null for a question without image")
    mask = read_bytes(folder, row["mask"], "mask") if row.get("mask") else None
    pictures = () if row["image"] is None else read_pictures(folder, row["image"])
    return Record(item.key, pictures, row, mask)


SOURCE = Source("jsonl", "images with a list of annotations", LAYOUT, missing, items, record)
