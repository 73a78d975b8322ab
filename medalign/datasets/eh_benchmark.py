"""EH-Benchmark (Pan et al. 2025): multiple-choice questions that show hallucinations about images of the eye."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import parse_entries, read_files
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import read_pictures, require_name
from medalign.datasets.splitting import canonical_path, parse_fraction, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import as_text, field

LAYOUT = """\
GRAPE.json, OCT5k.json, ...     lists of {"id": "images/a.png", "question": "...\\nA. ...\\nB. ...", "answer": "B"}
images/...                      the images, as the ids name them
(the lists may be in folders of their own, each with its images/)

The ids are read relative to their list's folder, or else to the whole folder. The question keeps its lettered choices,
and the answer is the letter, as the authors score it; the texts of the choices are kept in the metadata as options.
There is no published split: all samples go to test/ unless --test-share is below 1. All questions about an image are in
the same split."""

_OPTION = re.compile(r"^\s*([A-E])[.)]\s*(\S.*?)\s*$")
_LETTERS = "ABCDE"


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    return [] if _files(folder) else ["*.json: the questions, in the folder or in folders of their own"]


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    test_share, splits = settings["test_share"], dict[str, str]()  # the split of each image
    root = os.path.realpath(folder)
    for path, entries in read_files(_files(folder)):
        place, own = path.parent.relative_to(folder), os.path.realpath(path.parent)
        name = "_".join("-".join([*place.parts, path.stem]).replace(".", "_").split())
        for number, row in enumerate(parse_entries(entries, lambda fields: require_name(fields, "id"))):
            if isinstance(row, Refused):
                yield row
                continue
            image = os.path.normpath(os.path.join(os.path.relpath(own, root), canonical_path(own, row["id"], root)))
            splits[image] = split_by_hash(image, test_share)
            kept = {column: row.get(column) for column in ("id", "question", "answer")}
            data = kept | {"folder": str(place), "dataset": path.stem, "image": image}
            yield Item(splits[image], f"eh-{name}-{number:06d}", data)
    warn_of_empty_splits(splits, test_share)


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = item.data
    options, answer = _options(as_text(row["question"], "question")), field(row, "answer").upper()
    if answer not in _LETTERS[: len(options)] or len(answer) != 1:
        raise BadSample(f"answer is {answer!r}, which is not the letter of one of its {len(options)} choices")
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": field(row, "question"),
        "answer": answer,
        "answer_type": "closed",
        "options": options,
        "split": item.split,
        "case": row["image"],
        "dataset": row["dataset"],
    }
    return Record(item.key, read_pictures(folder / row["folder"], row["id"], folder), fields)


def _options(question: str) -> list[str]:
    """Return the choices A, B, ..., one per line. Raises BadSample if there are fewer than two, or one is left out."""
    found: list[tuple[Any, ...]] = [match.groups() for line in question.splitlines() if (match := _OPTION.match(line))]
    letters = "".join(letter for letter, _ in found)
    if len(found) < 2 or not _LETTERS.startswith(letters):
        raise BadSample(f"question has the choices {letters or 'none'}; it must list A, B, ... on lines of their own")
    return [" ".join(choice.split()) for _, choice in found]


CONVERTER = DatasetConverter(
    "eh-benchmark",
    "EH-Benchmark: multiple choice on images of the eye, for hallucinations",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (Setting("test-share", "fraction of the images in test/; the others are in train/", 1.0, parse=parse_fraction),),
    "EH-Benchmark (ppxy1/EH-Benchmark on GitHub links its archives)",
)
