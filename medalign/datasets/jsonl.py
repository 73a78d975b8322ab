"""A folder with `annotations.jsonl` and images: the generic format for any data set."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medalign.data.samples.image_tags import check_count, strip_tags
from medalign.data.samples.sample import BadSample, normalize_answer_type
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import parse_json
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import missing_paths, read_bytes, read_pictures
from medalign.datasets.grouped_split import Line, assign_splits
from medalign.datasets.image_fields import stated_images
from medalign.datasets.splitting import parse_fraction
from medalign.datasets.text_files import HEAD_BYTES, decode_utf8, encoding_problem
from medalign.errors import ConfigError

ANNOTATIONS = "annotations.jsonl"
DEFAULT_SPLIT = "train"
_NO_OBJECT = (
    "no line is a JSON object, but one object per line is required: convert pretty-printed JSON with jq -c . , lines "
    "that end in CR with tr '\\r' '\\n', and a table such as CSV with pandas' to_json(orient='records', lines=True)"
)
_ASSIGNS = ("group_by", "test_share", "val_share")  # settings that imply the split "image"
_TEST_SHARE = 0.2  # default if splits are assigned here

LAYOUT = """\
annotations.jsonl   one JSON object per line
the images and masks that it names, with paths relative to the folder

fields of a line:
  id           the key of the sample, unique
  image        path of an image, or a list of paths in order; null for a question without an image; "images" is also
               accepted; of an image with several frames (TIFF, GIF, DICOM, ...) the first is used, with a note
  task         "vqa" or "report"
  question     required for vqa; if it contains <image>, there must be one per image; they are removed, because the
               model's chat template places the images
  answer       required for vqa
  answer_type  "closed", "open" or "", in upper or lower case
  report       the target text; required for report
  boxes        optional: [[x0, y0, x1, y1], ...] in pixels of the first image, upright as in an image viewer
  mask         optional: path of a PNG with the size of the first image, or ""
  split        name of the shard folder: letters, digits, "_" and "-"; default "train"
All other fields are kept as metadata of the sample.

--split image assigns the lines without a split to train/ and test/. Lines that share an image get the same split, and
with --group-by patient also lines with the same "patient". A line with a split keeps it, and the lines that share an
image with it get the same split. Images are compared by file, so a copy with another name is another image."""


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    return missing_paths(folder, {ANNOTATIONS: "one JSON object per line"})


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    """Yield one item per line; a line that cannot be read is refused with its number."""
    lines = _with_remedy(_lines(folder))
    if settings["split"] == "image" or any(
        settings[name] is not None for name in ("group_by", "test_share", "val_share")
    ):
        lines = assign_splits(lines, folder, settings["group_by"] or (), *_shares(settings))
    for line in lines:
        if isinstance(line, Refused):
            yield line
            continue
        try:
            yield Item(line.row.get("split") or DEFAULT_SPLIT, line.row["id"], line.row)
        except BadSample as error:
            yield Refused(line.location, str(error))


def _shares(settings: Settings) -> tuple[float, float]:
    """Fractions of test and val. Raises ConfigError if they are more than 1."""
    test = _TEST_SHARE if settings["test_share"] is None else settings["test_share"]
    val = settings["val_share"] or 0.0
    if test + val > 1:
        raise ConfigError(f"--test-share {test} and --val-share {val} add up to more than 1")
    return test, val


def _lines(folder: Path) -> Iterator[Line | Refused]:
    first = True
    with (folder / ANNOTATIONS).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.removeprefix(BOM_UTF8).strip():
                continue
            location = f"{ANNOTATIONS} line {number}"
            problem = _file_problem(line) if first else ""
            if problem:
                yield Refused(location, problem)
                return
            first = False
            try:
                yield Line(location, _parse(line))
            except BadSample as error:
                yield Refused(location, str(error))


def _with_remedy(lines: Iterable[Line | Refused]) -> Iterator[Line | Refused]:
    """Yield the lines unchanged; of a file without any JSON object only the first one, with the remedy."""
    unread: list[Refused] | None = []
    for line in lines:
        if unread is not None and isinstance(line, Refused) and line.reason.startswith(("not JSON", "it is a JSON ")):
            unread.append(line)
            continue
        yield from unread or ()
        unread = None
        yield line
    if unread:
        yield Refused(unread[0].name, f"{unread[0].reason}; {_NO_OBJECT}")


def _file_problem(first: bytes) -> str:
    """Why a file with this first line cannot be read line by line, or ""."""
    problem = encoding_problem(first[:HEAD_BYTES])
    if problem:
        return f"the file {problem}"
    if first.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        return "one object per line is required, but this is a JSON list; convert it, for example with jq -c '.[]'"
    return ""


def _parse(line: bytes) -> dict[str, Any]:
    row = parse_json(decode_utf8(line))
    if not isinstance(row, dict):
        raise BadSample(f"it is a JSON {type(row).__name__}, not an object")
    split = row.get("split")
    if split is not None and not isinstance(split, str):
        raise BadSample(f"split is {split!r}; it names a folder, for example 'train'")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise BadSample(f"id is {row.get('id')!r}; each line needs a unique text")
    return normalize_answer_type(row)


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = dict(item.data)
    names = stated_images(row)
    if isinstance(row.get("question"), str):
        stripped, tags = strip_tags(row["question"])
        check_count(tags, len(names))
        row["question"] = stripped.strip() if tags else row["question"]
    mask = read_bytes(folder, row["mask"], "mask") if row.get("mask") else None
    return Record(item.key, read_pictures(folder, names) if names else (), row, mask)


CONVERTER = DatasetConverter(
    "jsonl",
    "images with a list of annotations",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        Setting("split", "keep the splits of the lines, or assign missing ones by image", "given", ("given", "image")),
        Setting(
            "group-by", "fields, such as patient, whose lines also stay together; implies --split image", several=True
        ),
        Setting(
            "test-share",
            "fraction of the images or groups in test/; implies --split image (default with it: 0.2)",
            parse=parse_fraction,
        ),
        Setting(
            "val-share",
            "fraction of the images or groups in val/; implies --split image (default with it: 0)",
            parse=parse_fraction,
        ),
    ),
)
