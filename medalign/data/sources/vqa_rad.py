"""VQA-RAD (Lau et al. 2018): clinicians' questions about head, chest and abdomen images of MedPix."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.sources.annotations import read_entries
from medalign.data.sources.files import lacking, read_picture, require_name
from medalign.data.sources.source import Chosen, Item, Setting, Source
from medalign.data.sources.splitting import Groups, share, share_split, warn_of_empty_splits
from medalign.data.sources.texts import field, text
from medalign.distributed import log

QUESTIONS = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
_PUBLISHED = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}  # by phrase_type

LAYOUT = """\
VQA_RAD Dataset Public.json    the questions
VQA_RAD Image Folder/          synpic100132.jpg, ...

Written are train/ and test/. The published test questions (phrase_type test_freeform, test_para) are about images
that train has too: 202 of the 203. Their score says how well images are remembered. With --split image every
question about an image, and about other images of its case, falls on one side."""


def missing(folder: Path, _chosen: Chosen) -> list[str]:
    return lacking(folder, {QUESTIONS: "the questions", IMAGES: "the images"})


def items(folder: Path, chosen: Chosen) -> Iterator[Item | Refused]:
    if chosen["split"] == "published":
        log.warning("VQA-RAD's published test split asks about images that train has too; --split image parts them")
    rows: dict[int, dict[str, Any]] = {}
    cases = Groups()
    for number, entry in enumerate(read_entries(folder / QUESTIONS)):
        try:
            row = entry.fields()
            image = require_name(row, "image_name")
            rows[number] = {**row, "published_split": _published_split(row)}
        except BadSample as error:
            yield Refused(entry.place, str(error))
            continue
        # One case has several images in places; its address is the same for them.
        cases.add([text(row.get("image_case_url")) or image, image])
    names = {number: cases.name(row["image_name"]) for number, row in rows.items()}
    parted = {name: share_split(name, chosen["test_share"]) for name in names.values()}
    if chosen["split"] == "image":
        warn_of_empty_splits(parted, chosen["test_share"])
    for number, row in rows.items():
        split = parted[names[number]] if chosen["split"] == "image" else row["published_split"]
        yield Item(split, f"vqarad-{number:04d}", row)


def _published_split(row: dict[str, Any]) -> str:
    """Raises BadSample for a phrase_type that names none: a test question must not enter train."""
    given = row.get("phrase_type")
    if (name := text(given).lower()) not in _PUBLISHED:
        raise BadSample(
            f"phrase_type is {reprlib.repr(given)}, which tells no split; known are {', '.join(_PUBLISHED)}"
        )
    return _PUBLISHED[name]


def record(folder: Path, item: Item, _chosen: Chosen) -> Record:
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


SOURCE = Source(
    "vqa-rad",
    "VQA-RAD: clinicians' questions on radiology",
    LAYOUT,
    missing,
    items,
    record,
    (
        Setting("split", "the published one, or one that parts images and cases", "published", ("published", "image")),
        Setting("test-share", "share of the cases that --split image tests on", 0.2, parse=share),
    ),
    "VQA-RAD (Open Science Framework, osf.io/89kps)",
)
