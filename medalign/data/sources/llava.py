"""Conversations in the JSON of LLaVA and LLaVA-Med: each turn becomes a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.sources.files import first_folder, read_json_list, read_pictures, share, share_split, text
from medalign.data.sources.source import Chosen, Item, Setting, Source
from medalign.errors import DataError

LAYOUT = """\
NAME.json         [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nIs it ...?"},
                    {"from": "gpt", "value": "Yes."}, ...]}, ...]   (llava_med_instruct_60k.json and its like)
images/a.jpg      the images; without a folder images/, paths start at the folder itself

Each question with the answer that follows it is one sample, about the same image; later ones do not show the earlier
turns. "image" may be a list of images, all of which come before the question. Entries without "image" are questions
without image. One JSON file goes to train/ (--test-share: a share of its images to test/, where an entry of several
goes by the first); several go to folders of their names, as in train.json, test.json, with "_" for points and spaces.
"domain" and "answer_type" are kept."""

_IMAGE_TOKENS = ("<image>", "<im_start>", "<im_end>")


def _files(folder: Path, chosen: Chosen) -> list[Path]:
    if chosen["annotations"]:
        return [folder / name for name in chosen["annotations"]]
    return sorted(folder.glob("*.json"))


def missing(folder: Path, chosen: Chosen) -> list[str]:
    files = _files(folder, chosen)
    if not files:
        return ["a .json file with the conversations"]
    return [f"{path}: conversations" for path in files if not path.exists()]


def items(folder: Path, chosen: Chosen) -> Iterator[Item | Refused]:
    files = _files(folder, chosen)
    for path in files:
        rows = read_json_list(path)
        if rows and not any(isinstance(row, dict) and "conversations" in row for row in rows):
            raise DataError(f"{path} holds no conversations; name the right files with --annotations")
        for number, row in enumerate(rows):
            place = f"{path.name} entry {number}"
            try:
                turns = _turns(row)
            except BadSample as error:
                yield Refused(place, str(error))
                continue
            case = _first_image(row.get("image")) or text(row.get("id")) or place
            split = _split_of(path) if len(files) > 1 else share_split(case, chosen["test_share"])
            shared = {name: row.get(name) for name in ("id", "image", "domain", "answer_type")}
            for turn, (question, answer) in enumerate(turns):
                data = {**shared, "turn": turn, "question": question, "answer": answer, "case": case}
                yield Item(split, f"{'_'.join(path.stem.replace('.', '_').split())[-40:]}-{number:07d}-{turn}", data)


def _split_of(path: Path) -> str:
    """A folder's name from the file's: "train_v1_2" of "train v1.2.json"."""
    return re.sub(r"^-|[^\w-]+", "_", path.stem[-40:])


def _first_image(image: Any) -> str:
    return text(image[0] if isinstance(image, list) and image else image)


def _turns(row: Any) -> list[tuple[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("no list of conversations")
    turns = [turn for turn in turns if turn.get("from") != "system"]
    if not turns or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise BadSample("conversation is not human and gpt in turn")
    said = [_without_tokens(turn.get("value")) for turn in turns]
    return list(zip(said[::2], said[1::2], strict=True))


def _without_tokens(value: Any) -> str:
    """What is said, its line breaks kept, without the places of the images: the chat template puts those."""
    said = value if isinstance(value, str) else text(value)
    for token in _IMAGE_TOKENS:
        said = said.replace(token, "")
    return said.strip()


def record(folder: Path, item: Item, _chosen: Chosen) -> Record:
    row = item.data
    given = text(row["answer_type"]).lower()
    domain = row["domain"]
    fields = {
        "id": text(row["id"]),
        "task": "vqa",
        "question": row["question"],
        "answer": row["answer"],
        "answer_type": given if given in ("open", "closed") else "open",
        "split": item.split,
        "case": row["case"],
        "image": row["image"],
        "turn": row["turn"],
        **({"domain": [name for name, holds in domain.items() if holds]} if isinstance(domain, dict) else {}),
    }
    pictures = read_pictures(first_folder(folder, "images", "."), row["image"]) if row["image"] else ()
    return Record(item.key, pictures, fields)


SOURCE = Source(
    "llava",
    "conversations in the JSON of LLaVA and LLaVA-Med",
    LAYOUT,
    missing,
    items,
    record,
    (
        Setting("annotations", "JSON files of the folder to read (default: all)", None, several=True),
        Setting("test-share", "share of the images of a single file that go to test/", 0.0, parse=share),
    ),
    "LLaVA-Med (github.com/microsoft/LLaVA-Med lists its files)",
)
