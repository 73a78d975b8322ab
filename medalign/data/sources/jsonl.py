"""A folder with `annotations.jsonl` and pictures: the plain format that any data set can be brought into."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medalign.data.image_tags import check_count, strip_tags
from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample, normalize_answer_type
from medalign.data.sources.annotations import HEAD, decode_utf8, encoding_problem, parse_json
from medalign.data.sources.files import lacking, read_bytes, read_pictures
from medalign.data.sources.grouped_split import Line, assign_splits
from medalign.data.sources.image_fields import named_images
from medalign.data.sources.source import Chosen, Item, Setting, Source
from medalign.data.sources.splitting import share
from medalign.data.sources.texts import is_missing
from medalign.errors import ConfigError

ANNOTATIONS = "annotations.jsonl"
DEFAULT_SPLIT = "train"
_NO_OBJECT = (
    "no line is a JSON object, and one object per line is needed: convert pretty-printed JSON with jq -c . , lines "
    "that end in CR with tr '\\r' '\\n', and a table such as CSV with pandas' to_json(orient='records', lines=True)"
)
_TEST_SHARE = 0.2  # where the lines are split here and no other share is given

LAYOUT = """\
annotations.jsonl   one JSON object a line
the pictures and masks that it names, by paths relative to the folder

fields of a line:
  id           the sample's key, unique
  image        path of a picture, or a list of paths in order; null for a question without image; "images" will do too;
               of a picture with several frames (TIFF, GIF, DICOM, ...) the first is shown, and they are counted
  task         "vqa" or "report"
  question     what is asked; needed for vqa; where it holds <image>, there must be one per picture, and they are taken
               out, for the model's chat template puts the pictures
  answer       needed for vqa
  answer_type  "closed", "open" or "", in letters of any size
  report       the text to be written; needed for report
  boxes        [[x0, y0, x1, y1], ...] in pixels of the (first) image as viewers show it, upright; may be left out
  mask         path of a PNG of the (first) image's size; may be left out or ""
  split        its own shard folder, named by letters, digits, "_" and "-"; "train" where it is left out or ""
Other fields are kept as the sample's metadata.

--split image divides the lines without a split into train/ and test/. Lines that share an image stay together, and so
do, with --group-by patient, lines with the same "patient". A line that names its split keeps it, and the lines that
share an image with it follow. Images are compared by file, so a copy under another name is another image."""


def missing(folder: Path, _chosen: Chosen) -> list[str]:
    return lacking(folder, {ANNOTATIONS: "one JSON object a line"})


def items(folder: Path, chosen: Chosen) -> Iterator[Item | Refused]:
    """One item a line; a line that cannot be read is refused with its number."""
    lines = _with_remedy(_lines(folder))
    if chosen["split"] == "image" or any(chosen[name] is not None for name in ("group_by", "test_share", "val_share")):
        lines = assign_splits(lines, folder, chosen["group_by"] or (), *_shares(chosen))
    for line in lines:
        if isinstance(line, Refused):
            yield line
            continue
        try:
            yield Item(line.row.get("split") or DEFAULT_SPLIT, line.row["id"], line.row)
        except BadSample as error:
            yield Refused(line.place, str(error))


def _shares(chosen: Chosen) -> tuple[float, float]:
    """Of test and val. Raises ConfigError for more than the whole."""
    test = _TEST_SHARE if chosen["test_share"] is None else chosen["test_share"]
    val = chosen["val_share"] or 0.0
    if test + val > 1:
        raise ConfigError(f"--test-share {test} and --val-share {val} are more than 1 together")
    return test, val


def _lines(folder: Path) -> Iterator[Line | Refused]:
    first = True
    with (folder / ANNOTATIONS).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.removeprefix(BOM_UTF8).strip():
                continue
            place = f"{ANNOTATIONS} line {number}"
            problem = _file_problem(line) if first else ""
            if problem:
                yield Refused(place, problem)
                return
            first = False
            try:
                yield Line(place, _parse(line))
            except BadSample as error:
                yield Refused(place, str(error))


def _with_remedy(lines: Iterable[Line | Refused]) -> Iterator[Line | Refused]:
    """The lines as they are; of a file without any JSON object only the first, with what the file should be."""
    unread: list[Refused] | None = []
    for line in lines:
        if unread is not None and isinstance(line, Refused) and line.reason.startswith(("not JSON", "a JSON ")):
            unread.append(line)
            continue
        yield from unread or ()
        unread = None
        yield line
    if unread:
        yield Refused(unread[0].name, f"{unread[0].reason}; {_NO_OBJECT}")


def _file_problem(first: bytes) -> str:
    """Why a file that begins with this line cannot be read line by line; "" where it can."""
    problem = encoding_problem(first[:HEAD])
    if problem:
        return f"the file {problem}"
    if first.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        return "one object a line is needed, this is one JSON list; convert it, as with jq -c '.[]'"
    return ""


def _parse(line: bytes) -> dict[str, Any]:
    row = parse_json(decode_utf8(line))
    if not isinstance(row, dict):
        raise BadSample(f"a JSON {type(row).__name__}, not an object")
    split = row.get("split")
    if split is not None and not isinstance(split, str):
        raise BadSample(f"split is {split!r}; it names a folder, such as 'train'")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise BadSample(f"id is {row.get('id')!r}; each line needs a text that is its own")
    return normalize_answer_type(row)


def record(folder: Path, item: Item, _chosen: Chosen) -> Record:
    row = dict(item.data)
    if "image" not in row and "images" not in row:
        raise BadSample("no image is named; write null for a question without image")
    names = _images(row)
    if isinstance(row.get("question"), str):
        stripped, tags = strip_tags(row["question"])
        check_count(tags, len(names))
        row["question"] = stripped.strip() if tags else row["question"]
    mask = read_bytes(folder, row["mask"], "mask") if row.get("mask") else None
    return Record(item.key, read_pictures(folder, names) if names else (), row, mask)


def _images(row: dict[str, Any]) -> list[Any]:
    """The names of a line's pictures. Raises BadSample for one that is empty rather than null."""
    for name in ("image", "images"):
        value = row.get(name)
        if value is not None and not isinstance(value, list) and is_missing(value):
            raise BadSample(f"{name} is {value!r}; a path relative to the folder is needed")
    return named_images(row)


SOURCE = Source(
    "jsonl",
    "images with a list of annotations",
    LAYOUT,
    missing,
    items,
    record,
    (
        Setting("split", "the lines' own, or, for lines without, one by image", "given", ("given", "image")),
        Setting(
            "group-by", "fields, such as patient, whose lines stay together too; implies --split image", several=True
        ),
        Setting(
            "test-share", "share of the images or groups that go to test/; implies --split image, with 0.2", parse=share
        ),
        Setting(
            "val-share", "share of the images or groups that go to val/; implies --split image, with 0", parse=share
        ),
    ),
)
