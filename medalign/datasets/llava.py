"""Conversations in the JSON format of LLaVA and LLaVA-Med; each turn becomes a sample."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import Entry, read_entries, read_files
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.conversations import Turn, has_conversation, parse_entry
from medalign.datasets.files import first_folder, read_pictures
from medalign.datasets.splitting import Groups, canonical_path, parse_fraction, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import as_text, text
from medalign.errors import DataError

LAYOUT = """\
NAME.json         [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nIs it ...?"},
                    {"from": "gpt", "value": "Yes."}, ...]}, ...]   (for example llava_med_instruct_60k.json)
images/a.jpg      the images; a path that is not found there, or any path without images/, is relative to the folder

A file contains a JSON list, or JSON lines (NAME.jsonl is read if there is no NAME.json). "images" is read like "image",
and "messages" with "role" and "content" like "conversations" with "from" and "value".

Each question with the answer that follows it is one sample; earlier turns are not shown. "image" may be a list of
images. The text contains one <image> per image, and an image belongs to the turn of its <image> and to later ones; in a
text without <image>, all images come before the first question. Any other number is refused. Entries without an image
and without <image> are questions without an image.

A single JSON file goes to train/ (with --test-share, a fraction of its images to test/, where entries that share an
image stay together). Several files go to folders with their names, for example train.json and test.json, with "_" for
dots and spaces. "domain" and "answer_type" are kept."""


def _files(folder: Path, settings: Settings) -> list[Path]:
    if settings["annotations"]:
        return [folder / name for name in settings["annotations"]]
    return sorted(folder.glob("*.json")) or sorted(folder.glob("*.jsonl"))


def _validate_layout(folder: Path, settings: Settings) -> list[str]:
    files = _files(folder, settings)
    if not files:
        return ["a .json file with the conversations"]
    return [f"{path}: conversations" for path in files if not path.exists()]


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    files = _files(folder, settings)
    _require_unique_names(files)
    for path, entries in read_files(files, _read):
        conversations: list[_Conversation] = []
        for number, entry in enumerate(entries):
            try:
                conversations.append(
                    _Conversation(number, entry.location, entry.fields(), *parse_entry(entry.fields()))
                )
            except BadSample as error:
                yield Refused(entry.location, str(error))
        splits = [_split_of(path)] * len(conversations)
        if len(files) == 1:
            splits = _splits_by_image(folder, conversations, settings["test_share"])
        for one, split in zip(conversations, splits, strict=True):
            yield from _samples(one, split, _key_of(path))


def _read(path: Path) -> list[Entry]:
    """Read the entries of a file. Raises DataError if it has none with a conversation."""
    entries = read_entries(path)
    read = [entry.value for entry in entries if not entry.problem]
    if read and not any(map(has_conversation, read)):
        raise DataError(f"{path} contains no conversations; name the right files with --annotations")
    return entries


def _require_unique_names(files: Sequence[Path]) -> None:
    """Raise DataError if the split or the keys of two files would have the same name."""
    for name_of in (_split_of, _key_of):
        first: dict[str, Path] = {}
        for path in files:
            other = first.setdefault(name_of(path), path)
            if other is not path:
                raise DataError(f"{other} and {path} would both be written as {name_of(path)!r}; rename one of them")


@dataclass(frozen=True)
class _Conversation:
    """An entry: its index in the file, its images and its turns."""

    number: int
    location: str
    row: dict[str, Any]
    images: list[Any]
    turns: list[Turn]

    @property
    def case(self) -> str:
        return (text(self.images[0]) if self.images else "") or text(self.row.get("id")) or self.location


def _splits_by_image(folder: Path, conversations: Sequence[_Conversation], test_share: float) -> list[str]:
    """Assign a split to each entry so that no image is in two splits."""
    if not test_share:
        return ["train"] * len(conversations)
    images, groups = os.path.realpath(first_folder(folder, "images", ".")), Groups()
    members = []
    for one in conversations:
        names = [name for name in one.images if isinstance(name, str)]
        members.append([canonical_path(images, name, os.path.abspath(folder)) for name in names] or [one.case])
        groups.add(members[-1])
    splits = {name: split_by_hash(name, test_share) for name in (groups.name(names[0]) for names in members)}
    warn_of_empty_splits(splits, test_share)
    return [splits[groups.name(names[0])] for names in members]


def _samples(one: _Conversation, split: str, prefix: str) -> Iterator[Item]:
    """Yield one item per turn, with the images shown up to it, in the form in which the entry names them."""
    shared = {name: one.row.get(name) for name in ("id", "domain", "answer_type")} | {"case": one.case}
    single = not isinstance(one.row.get("image") or one.row.get("images"), list)
    for index, turn in enumerate(one.turns):
        shown = one.images[: turn.images]
        data = {
            **shared,
            "image": (shown[0] if single else shown) if shown else None,
            "turn": index,
            "question": turn.question,
            "answer": turn.answer,
        }
        yield Item(split, f"{prefix}-{one.number:07d}-{index}", data)


def _split_of(path: Path) -> str:
    """Derive the name of a folder from that of a file: "train_v1_2" from "train v1.2.json"."""
    return re.sub(r"^-|[^\w-]+", "_", path.stem[-40:])


def _key_of(path: Path) -> str:
    """Prefix of the keys: the name of the file without dots and white space, its last 40 bytes."""
    return "_".join(path.stem.replace(".", "_").split()).encode("utf-8", "replace")[-40:].decode("utf-8", "ignore")


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = item.data
    given = text(row["answer_type"]).lower()
    domain = row["domain"]
    fields = {
        "id": text(row["id"]),
        "task": "vqa",
        "question": as_text(row["question"], "question").strip(),
        "answer": as_text(row["answer"], "answer").strip(),
        "answer_type": given if given in ("open", "closed") else "open",
        "split": item.split,
        "case": row["case"],
        "image": row["image"],
        "turn": row["turn"],
        **({"domain": [name for name, holds in domain.items() if holds]} if isinstance(domain, dict) else {}),
    }
    pictures = read_pictures(first_folder(folder, "images", "."), row["image"], folder) if row["image"] else ()
    return Record(item.key, pictures, fields)


CONVERTER = DatasetConverter(
    "llava",
    "conversations in the JSON of LLaVA and LLaVA-Med",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        Setting("annotations", "JSON files of the folder to read (default: all)", None, several=True),
        Setting("test-share", "fraction of the images of a single file in test/", 0.0, parse=parse_fraction),
    ),
    "LLaVA-Med (github.com/microsoft/LLaVA-Med lists its files)",
)
