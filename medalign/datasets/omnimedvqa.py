"""OmniMedVQA (Hu et al. 2024): multiple-choice questions on 73 data sets of 12 modalities."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import normpath
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import parse_entries, read_files
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import read_picture, require_name
from medalign.datasets.splitting import parse_fraction, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import field, text

LAYOUT = """\
QA_information/Open-access/ACRIMA.json, ...      the questions, one file per data set
QA_information/Restricted-access/...             read only with --access all: their images must be downloaded one by one
Images/...                                       the images, as the questions name them
(all of this may be in the folder OmniMedVQA/ of the archive)

The question lists its choices, and the answer is the text of the correct one. There is no published split: all samples
go to test/ unless --test-share is below 1. All questions about an image are in the same split."""

_CHOICES = "ABCD"


def _root(folder: Path) -> Path:
    return folder / "OmniMedVQA" if (folder / "OmniMedVQA" / "QA_information").is_dir() else folder


def _files(folder: Path, access: str) -> list[Path]:
    names = ("Open-access", "Restricted-access") if access == "all" else ("Open-access",)
    return [path for name in names for path in sorted((_root(folder) / "QA_information" / name).glob("*.json"))]


def _validate_layout(folder: Path, settings: Settings) -> list[str]:
    lines = [] if _files(folder, settings["access"]) else ["QA_information/Open-access/*.json: the questions"]
    return lines + ([] if (_root(folder) / "Images").is_dir() else ["Images: the images"])


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    test_share, splits = settings["test_share"], dict[str, str]()  # the split of each image
    for path, entries in read_files(_files(folder, settings["access"])):
        for number, row in enumerate(parse_entries(entries, lambda fields: require_name(fields, "image_path"))):
            if isinstance(row, Refused):
                yield row
                continue
            key = "_".join(f"omni-{path.stem}-{number:06d}".replace(".", "_").split())
            image = normpath(row["image_path"])
            splits[image] = split_by_hash(image, test_share)
            yield Item(splits[image], key, row)
    warn_of_empty_splits(splits, test_share)


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = item.data
    question, answer, options = field(row, "question"), field(row, "gt_answer"), _options(row)
    if not answer:
        raise BadSample("gt_answer is empty")
    if answer not in options:
        raise BadSample("correct answer is not one of the choices")
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
        "modality": text(row.get("modality_type") or row.get("modality")),  # one file uses the second name
    }
    return Record(item.key, (read_picture(_root(folder), row["image_path"]),), fields)


def _options(row: dict[str, Any]) -> list[str]:
    return [option for letter in _CHOICES if (option := field(row, f"option_{letter}"))]


CONVERTER = DatasetConverter(
    "omnimedvqa",
    "OmniMedVQA: multiple choice over many modalities",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        Setting("access", "only open-access data sets, or all", "open", ("open", "all")),
        Setting("test-share", "fraction of the images in test/; the others are in train/", 1.0, parse=parse_fraction),
    ),
    "OmniMedVQA (OpenGVLab; foreverbeliever/OmniMedVQA on Hugging Face)",
)
