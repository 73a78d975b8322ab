"""SLAKE (Liu et al. 2021): questions in English and Chinese about CT, MR and X-ray, with organ masks and boxes.

The ground truth for grounding consists of the boxes and mask pixels of the organs and diseases that the question or its
answer names ("left kidney" means that one, "kidneys" both), that is, where a model should look. A question that names
none ("Which plane is this?") has no ground truth. All boxes of the image are kept in the metadata as `regions`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medalign.data.samples.decode import decode_mask, picture_header
from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import parse_entries, read_files, read_json
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import missing_paths, png, read_bytes, read_picture, require_name
from medalign.datasets.text_files import read_text
from medalign.datasets.texts import field, is_missing, text
from medalign.errors import DataError

LAYOUT = """\
train.json, validate.json (or validation.json), test.json
mask.txt                        gray value of each organ in the masks
imgs/xmlab0/source.jpg          the image
imgs/xmlab0/mask.png            its organs and diseases, one gray value each
imgs/xmlab0/detection.json      [{"Liver": [x, y, width, height]}, ...]
imgs/xmlab1/...

The output is train/, val/ and test/ of the published split (by image). A question keeps the boxes and the mask of the
organs that it or its answer names; all boxes of its image are kept in the metadata as regions."""

_SPLITS = (("train", "train.json"), ("val", "validate.json|validation.json"), ("test", "test.json"))
_KEPT = ("qid", "modality", "location", "content_type", "base_type", "triple")
_TOKEN = re.compile(r"\d+|[^\W\d_](?:[^\W\d_]|[ -])*")  # a number, or words


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    questions = {names: f"the questions of the {split} split" for split, names in _SPLITS}
    return missing_paths(folder, {**questions, "imgs": "the images", "mask.txt": "names of the masks' gray values"})


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    languages = settings["languages"]
    paths = [next(folder / name for name in names.split("|") if (folder / name).exists()) for _, names in _SPLITS]
    for (split, _), (_, entries) in zip(_SPLITS, read_files(paths), strict=True):
        for number, row in enumerate(parse_entries(entries, lambda fields: require_name(fields, "img_name"))):
            key = f"slake-{split}-{number:05d}"
            if isinstance(row, Refused):
                yield row
            elif row.get("q_lang") not in languages:
                yield Refused(key, f"language is {text(row.get('q_lang')) or 'not given'}, which is not in --languages")
            else:
                yield Item(split, key, row)


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = item.data
    picture = read_picture(folder / "imgs", row["img_name"])
    place = folder / "imgs" / Path(row["img_name"]).parent
    size = picture_header(picture.data)[1:]
    regions = [(label, box) for label, given in _boxes(place) if (box := _inside(given, size))]
    question, answer = field(row, "question"), field(row, "answer")
    named = _Named(f"{question} {answer}")
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": question,
        "answer": answer,
        "answer_type": text(row.get("answer_type")).lower(),
        "boxes": [box for label, box in regions if named(label)],
        "regions": [{"label": label, "box": box} for label, box in regions],
        "language": row.get("q_lang"),
        "split": item.split,
        "case": Path(row["img_name"]).parts[0],
        **{name: None if is_missing(row.get(name)) else row[name] for name in _KEPT},
    }
    return Record(item.key, (picture,), fields, _mask(folder, place, named))


class _Named:
    """Tells whether a text names an organ, by whole words, singular or plural; "kidneys" also names the left one."""

    def __init__(self, sentence: str) -> None:
        self.words = f" {_words(sentence)} "

    def __call__(self, label: str) -> bool:
        words = _words(label)
        if f" {words} " in self.words:
            return True
        side, _, organ = words.partition(" ")
        if side not in ("left", "right") or not organ:
            return False
        # "the lung" or "lungs" without a side means both sides; "right lung" does not mean the left one.
        unsided = self.words.replace(f" left {organ} ", " ").replace(f" right {organ} ", " ")
        return f" {organ} " in unsided


def _words(sentence: str) -> str:
    return " ".join(word.removesuffix("s") for word in re.findall(r"\w+", sentence.lower()))


def _boxes(place: Path) -> list[tuple[str, Any]]:
    path = place / "detection.json"
    if not path.exists():
        return []
    try:
        found = read_json(path)
    except DataError as error:
        raise BadSample("detection.json is not JSON") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BadSample("detection.json is not a list of organs with boxes")
    return [(label, box) for one in found for label, box in one.items()]


def _inside(given: Any, size: tuple[int, ...]) -> list[float] | None:
    """Convert x, y, width, height to corners inside the image; None if no area remains."""
    numbers = isinstance(given, list) and len(given) == 4
    if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in given):
        raise BadSample(f"box {given!r} in detection.json is not x, y, width, height")
    x, y, width, height = given
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None


def _mask(folder: Path, place: Path, named: _Named) -> bytes | None:
    """The pixels of the named organs as a one-bit PNG, or None if there are none."""
    values = [value for value, label in _gray_values(folder / "mask.txt") if named(label)]
    if not values or not (place / "mask.png").exists():
        return None
    stored = np.asarray(decode_mask(read_bytes(place, "mask.png", "mask")))
    chosen = np.isin(stored if stored.ndim == 2 else stored[..., 0], values)
    return png(Image.fromarray(chosen)) if chosen.any() else None


def _gray_values(path: Path) -> list[tuple[int, str]]:
    """Gray value and organ of each pair in the file, in either order and with any separator."""
    pairs = []
    for line in read_text(path).splitlines():
        tokens = _TOKEN.findall(line)
        for pair in zip(tokens[::2], tokens[1::2], strict=False):  # a single heading is not a pair
            value, label = sorted(pair, key=str.isdigit, reverse=True)
            if value.isdigit() and not label.isdigit():
                pairs.append((int(value), label.strip()))
    if not pairs:
        raise DataError(f"{path} lists no gray value; each line must contain one, for example 70:Liver")
    return pairs


CONVERTER = DatasetConverter(
    "slake",
    "SLAKE: questions on radiology with masks and boxes",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (Setting("languages", "languages of the questions to convert", ["en"], ("en", "zh"), several=True),),
    "SLAKE 1.0 (med-vqa.com/slake; BoKelvin/SLAKE on Hugging Face)",
)
