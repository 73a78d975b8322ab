"""VQA-RAD (Lau et al. 2018): clinicians' questions about head, chest and abdomen images of MedPix."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import parse_entries, read_entries
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import missing_paths, read_picture, require_name
from medalign.datasets.splitting import Groups, parse_fraction, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import field, text
from medalign.distributed import log

QUESTIONS = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
_PUBLISHED = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}  # by phrase_type

LAYOUT = """\
VQA_RAD Dataset Public.json    the questions
VQA_RAD Image Folder/          synpic100132.jpg, ...

The output is train/ and test/. The published test questions (phrase_type test_freeform, test_para) are about images
that are also in train: 202 of the 203. Their score measures how well images are remembered. With --split image, all
questions about an image, and about other images of its case, are in the same split."""


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    return missing_paths(folder, {QUESTIONS: "the questions", IMAGES: "the images"})


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    if settings["split"] == "published":
        log.warning("VQA-RAD's published test split asks about images of the train split; --split image avoids this")
    rows: dict[int, dict[str, Any]] = {}
    cases = Groups()
    for number, row in enumerate(parse_entries(read_entries(folder / QUESTIONS), _parse)):
        if isinstance(row, Refused):
            yield row
            continue
        rows[number] = row
        # Some cases have several images, which share a case URL.
        cases.add([text(row.get("image_case_url")) or row["image_name"], row["image_name"]])
    names = {number: cases.name(row["image_name"]) for number, row in rows.items()}
    by_case = {name: split_by_hash(name, settings["test_share"]) for name in names.values()}
    if settings["split"] == "image":
        warn_of_empty_splits(by_case, settings["test_share"])
    for number, row in rows.items():
        split = by_case[names[number]] if settings["split"] == "image" else row["published_split"]
        yield Item(split, f"vqarad-{number:04d}", row)


def _parse(row: dict[str, Any]) -> dict[str, Any]:
    return {**require_name(row, "image_name"), "published_split": _published_split(row)}


def _published_split(row: dict[str, Any]) -> str:
    """Return the published split. Raises BadSample for an unknown phrase_type: a test question must not enter train."""
    given = row.get("phrase_type")
    if (name := text(given).lower()) not in _PUBLISHED:
        raise BadSample(
            f"phrase_type is {reprlib.repr(given)}, which determines no split; "
            f"it must be one of {', '.join(_PUBLISHED)}"
        )
    return _PUBLISHED[name]


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = item.data
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": field(row, "question"),
        "answer": field(row, "answer"),  # some are numbers
        "answer_type": text(row.get("answer_type")).lower(),
        "split": item.split,
        "published_split": row["published_split"],
        "case": row["image_name"],
        "qid": text(row.get("qid")),
        "organ": text(row.get("image_organ")),
        "question_type": text(row.get("question_type")),
        "phrase_type": text(row.get("phrase_type")),
    }
    return Record(item.key, (read_picture(folder / IMAGES, row["image_name"]),), fields)


CONVERTER = DatasetConverter(
    "vqa-rad",
    "VQA-RAD: clinicians' questions on radiology",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        Setting("split", "the published split, or one by images and cases", "published", ("published", "image")),
        Setting("test-share", "fraction of the cases in test/ with --split image", 0.2, parse=parse_fraction),
    ),
    "VQA-RAD (Open Science Framework, osf.io/89kps)",
)
