"""OmniMedVQA (Hu et al. 2024): multiple-choice questions on 73 data sets of 12 modalities."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import normpath
from pathlib import Path
from typing import Any

from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.sources.annotations import read_entries
from medalign.data.sources.files import read_picture, require_name
from medalign.data.sources.source import Chosen, Item, Setting, Source
from medalign.data.sources.splitting import share, share_split, warn_of_empty_splits
from medalign.data.sources.texts import field, text

LAYOUT = """\
QA_information/Open-access/ACRIMA.json, ...      the questions, one file a data set
QA_information/Restricted-access/...             only read with --access all: their images must be fetched one by one
Images/...                                       the images, as the questions name them
(the folder OmniMedVQA/ of the archive may stand in between)

The question lists its choices, and the answer is the right one's text. There is no published split: all goes to test/
unless --test-share says otherwise; an image's questions stay together."""

_CHOICES = "ABCD"


def _root(folder: Path) -> Path:
    return folder / "OmniMedVQA" if (folder / "OmniMedVQA" / "QA_information").is_dir() else folder


def _files(folder: Path, access: str) -> list[Path]:
    names = ("Open-access", "Restricted-access") if access == "all" else ("Open-access",)
    return [path for name in names for path in sorted((_root(folder) / "QA_information" / name).glob("*.json"))]


def missing(folder: Path, chosen: Chosen) -> list[str]:
    lines = [] if _files(folder, chosen["access"]) else ["QA_information/Open-access/*.json: the questions"]
    return lines + ([] if (_root(folder) / "Images").is_dir() else ["Images: the images"])


def items(folder: Path, chosen: Chosen) -> Iterator[Item | Refused]:
    test_share, splits = chosen["test_share"], dict[str, str]()  # the split of each image
    for path in _files(folder, chosen["access"]):
        for number, entry in enumerate(read_entries(path)):
            try:
                row = entry.fields()
                require_name(row, "image_path")
            except BadSample as error:
                yield Refused(entry.place, str(error))
                continue
            key = "_".join(f"omni-{path.stem}-{number:06d}".replace(".", "_").split())
            image = normpath(row["image_path"])
            splits[image] = share_split(image, test_share)
            yield Item(splits[image], key, row)
    warn_of_empty_splits(splits, test_share)


def record(folder: Path, item: Item, _chosen: Chosen) -> Record:
    row = item.data
    question, answer, options = field(row, "question"), field(row, "gt_answer"), _options(row)
    if not answer:
        raise BadSample("gt_answer is empty")
    if answer not in options:
        raise BadSample("right answer is none of the choices")
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": f"{question} Choose one: {'; '.join(options)}" if question else "",
        "answer": answer,
        "answer_type": "closed",
        "options": options,
        "split": item.split,
        "case": row["image_path"],
        "qid": text(row.get("question_id")),
        "dataset": text(row.get("dataset")),
        "question_type": text(row.get("question_type")),
        "modality": text(row.get("modality_type") or row.get("modality")),  # one file names it so
    }
    return Record(item.key, (read_picture(_root(folder), row["image_path"]),), fields)


def _options(row: dict[str, Any]) -> list[str]:
    return [option for letter in _CHOICES if (option := field(row, f"option_{letter}"))]


SOURCE = Source(
    "omnimedvqa",
    "OmniMedVQA: multiple choice over many modalities",
    LAYOUT,
    missing,
    items,
    record,
    (
        Setting("access", "open-access data sets alone, or all", "open", ("open", "all")),
        Setting("test-share", "share of the images that go to test/; the rest to train/", 1.0, parse=share),
    ),
    "OmniMedVQA (OpenGVLab; foreverbeliever/OmniMedVQA on Hugging Face)",
)
