"""Samples on their way into a shard, and the checks that each must pass. The schema stands in `shards`."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medalign.data.decode import decode_image, decode_mask, picture_header
from medalign.data.listing import LONGEST
from medalign.data.members import MOST_IMAGES
from medalign.data.samples import BadSample, check_fields, image_name, naming

_BAD_NAME = re.compile(r"[./\\\s\x00-\x1f\ud800-\udfff]|^__|^$")
_BAD_FOLDER = re.compile(r"[\\\s\x00-\x1f\ud800-\udfff]|^\.{0,2}$")
_LONGEST_KEY = 80  # bytes; tar's plain header holds names of 100
_LONGEST_PATH = 255  # bytes, of a key in the tars of others
_RECENT = 1 << 16  # keys that are held one by one before they are sorted


@dataclass(frozen=True)
class Picture:
    """One image, encoded."""

    data: bytes  # the file's content
    format: Literal["png", "jpg"]
    notes: tuple[str, ...] = ()  # what a user should know of its decoding, counted as `Record.notes` are


@dataclass(frozen=True)
class Record:
    """One sample, encoded, on its way into a shard."""

    key: str
    images: tuple[Picture, ...]  # in order; empty for a sample without image
    fields: dict[str, Any]  # the annotation, see the schema
    mask: bytes | None = None  # an encoded PNG, of the first image
    notes: tuple[str, ...] = ()  # what a user should know of a sample that is written; equal notes are counted

    def all_notes(self) -> tuple[str, ...]:
        """The record's notes and those of its images."""
        return sum((picture.notes for picture in self.images), self.notes)


@dataclass(frozen=True)
class Refused:
    """What a source could not even make a record of; `write_shards` only lists it."""

    name: str  # the sample's key, or file and line
    reason: str


def check_record(record: Record, seen: Container[str]) -> None:
    """Raises BadSample for the first thing that breaks the schema; `seen` holds the keys that are taken."""
    check_key(record.key, seen)
    if len(record.images) > MOST_IMAGES:
        raise BadSample(f"there are {len(record.images)} images; at most {MOST_IMAGES} are read")
    sizes = []
    for number, picture in enumerate(record.images):
        with naming(image_name(number, len(record.images))):
            sizes.append(_checked(picture))
    size = sizes[0] if sizes else None
    check_fields(record.fields, size, len(sizes))
    if record.mask is not None:
        _check_mask(record.mask, size)
    try:
        json_bytes(record.fields)
    except (TypeError, ValueError) as error:
        raise BadSample(f"annotation cannot be written as JSON ({error})") from error


def check_key(key: str, seen: Container[str]) -> None:
    """Raises BadSample for a key that cannot be a member's name, or is taken."""
    if _BAD_NAME.search(key) or len(key.encode()) > _LONGEST_KEY:
        raise BadSample(
            f"key {reprlib.repr(key)} must have 1 to {_LONGEST_KEY} bytes, without '.', '/', '\\', white space"
        )
    _check_free(key, seen)


def check_path_key(key: str, seen: Container[str]) -> None:
    """As `check_key` for the tars of others, whose keys may stand in folders: "train/0001"."""
    *folders, name = key.split("/")
    bad = _BAD_NAME.search(name) or any(_BAD_FOLDER.search(folder) for folder in folders)
    if bad or len(key.encode()) > _LONGEST_PATH:
        raise BadSample(
            f"key {reprlib.repr(key)} must have 1 to {_LONGEST_PATH} bytes, without '\\', white space or a folder '', "
            "'.', '..'"
        )
    _check_free(key, seen)


def _check_free(key: str, seen: Container[str]) -> None:
    if key in seen:
        raise BadSample("key occurs a second time; keys must be unique")


class KeySet(Container[str]):
    """Keys that are taken, 8 bytes each: of ten million a set of texts would take a gigabyte.

    A key is known by a hash of 64 bits: among ten million keys the odds are 3 in a million that any two share one, and
    the second is then called taken.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: str) -> None:
        self._recent.add(_hash(key))
        if len(self._recent) > max(_RECENT, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()

    def __contains__(self, key: object) -> bool:
        number = _hash(str(key))
        place = int(self._sorted.searchsorted(np.uint64(number)))
        return number in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == number)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def checked_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format and size of an image, its pixels left alone. Raises BadSample for one that the index cannot hold."""
    kind, width, height = picture_header(data)
    if max(width, height) > LONGEST:
        raise BadSample(f"image has {width} x {height} pixels; at most {LONGEST} a side are read")
    return kind, (width, height)


def json_bytes(fields: dict[str, Any]) -> bytes:
    """The annotation as it is stored. Raises TypeError or ValueError for what JSON does not have."""
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _checked(picture: Picture) -> tuple[int, int]:
    """The size of an image that can be decoded and is what its name says."""
    kind, _ = checked_header(picture.data)
    if kind != picture.format:
        raise BadSample(f"image is named {picture.format} but holds {kind}")
    return decode_image(picture.data).size


def _check_mask(mask: bytes, size: tuple[int, int] | None) -> None:
    check_mask_header(mask, size)
    with naming("mask"):
        decode_mask(mask)


def check_mask_header(mask: bytes, size: tuple[int, int] | None) -> None:
    """Raises BadSample for a mask that does not fit the (first) image's size, None without one; pixels stay unread."""
    if size is None:
        raise BadSample("a mask is given, but there is no image")
    with naming("mask"):
        kind, width, height = picture_header(mask)
    if kind != "png":
        raise BadSample(f"mask is {kind}; only PNG keeps it exact")
    if (width, height) != size:
        raise BadSample(f"mask has {width} x {height} pixels, the image {size[0]} x {size[1]}")
