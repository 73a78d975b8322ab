"""Samples to be written to a shard, and their validation. The schema is described in `writer`."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medalign.data.samples.decode import decode_image, decode_mask, picture_header
from medalign.data.samples.sample import BadSample, check_fields, image_name, sample_context
from medalign.data.shards.listing import MAX_LENGTH
from medalign.data.shards.members import MAX_IMAGES

_BAD_NAME = re.compile(r"[./\\\s\x00-\x1f\ud800-\udfff]|^__|^$")
_BAD_FOLDER = re.compile(r"[\\\s\x00-\x1f\ud800-\udfff]|^\.{0,2}$")
_MAX_KEY_BYTES = 80  # the plain tar header holds names of 100 bytes
_MAX_PATH_BYTES = 255  # of a key in tars from other tools
_RECENT = 1 << 16  # keys kept in a set before they are merged into the sorted array


@dataclass(frozen=True)
class Picture:
    """One image, encoded."""

    data: bytes  # the file's content
    format: Literal["png", "jpg"]
    notes: tuple[str, ...] = ()  # remarks about its decoding for the user, counted like `Record.notes`


@dataclass(frozen=True)
class Record:
    """One encoded sample to be written to a shard."""

    key: str
    images: tuple[Picture, ...]  # in order; empty for a sample without an image
    fields: dict[str, Any]  # the annotation, see the schema
    mask: bytes | None = None  # encoded PNG that masks the first image
    notes: tuple[str, ...] = ()  # remarks for the user about a sample that is written; equal notes are counted

    def all_notes(self) -> tuple[str, ...]:
        """Return the notes of the record and of its images."""
        return sum((picture.notes for picture in self.images), self.notes)


@dataclass(frozen=True)
class Refused:
    """A sample that could not be turned into a record; `write_shards` only reports it."""

    name: str  # the sample's key, or file and line
    reason: str


def check_record(record: Record, seen: Container[str]) -> None:
    """Check a record against the schema.

    Args:
        record: the record to check.
        seen: keys that are already used.

    Raises:
        BadSample: the record violates the schema; the message gives the first violation.
    """
    check_key(record.key, seen)
    if len(record.images) > MAX_IMAGES:
        raise BadSample(f"there are {len(record.images)} images; at most {MAX_IMAGES} are read")
    sizes = []
    for index, picture in enumerate(record.images):
        with sample_context(image_name(index, len(record.images))):
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
    """Check a key that becomes a member name. Raises BadSample if it is invalid or in `seen`."""
    if _BAD_NAME.search(key) or len(key.encode()) > _MAX_KEY_BYTES:
        raise BadSample(
            f"key {reprlib.repr(key)} must have 1 to {_MAX_KEY_BYTES} bytes, without '.', '/', '\\', white space"
        )
    _check_free(key, seen)


def check_path_key(key: str, seen: Container[str]) -> None:
    """Check a key like `check_key`, but for tars from other tools, whose keys may contain folders: "train/0001"."""
    *folders, name = key.split("/")
    bad = _BAD_NAME.search(name) or any(_BAD_FOLDER.search(folder) for folder in folders)
    if bad or len(key.encode()) > _MAX_PATH_BYTES:
        raise BadSample(
            f"key {reprlib.repr(key)} must have 1 to {_MAX_PATH_BYTES} bytes, without '\\', white space or a folder "
            "'', '.', '..'"
        )
    _check_free(key, seen)


def _check_free(key: str, seen: Container[str]) -> None:
    if key in seen:
        raise BadSample("key occurs a second time; keys must be unique")


class KeySet(Container[str]):
    """A set of keys that takes 8 bytes per key, where a set of strings would take a gigabyte for ten million.

    Keys are stored as 64-bit hashes. Among ten million keys, the probability that any two collide is 3 in a million;
    the second one is then reported as a duplicate.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: str) -> None:
        """Add a key."""
        self._recent.add(_hash(key))
        if len(self._recent) > max(_RECENT, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()

    def __contains__(self, key: object) -> bool:
        code = _hash(str(key))
        position = int(self._sorted.searchsorted(np.uint64(code)))
        return code in self._recent or (position < len(self._sorted) and int(self._sorted[position]) == code)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def checked_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Read format and size of an image without decoding its pixels.

    Returns:
        The file extension of the format, and (width, height) in pixels.

    Raises:
        BadSample: the image is not readable, or too large for the index.
    """
    kind, width, height = picture_header(data)
    if max(width, height) > MAX_LENGTH:
        raise BadSample(f"image has {width} x {height} pixels; at most {MAX_LENGTH} per side are read")
    return kind, (width, height)


def json_bytes(fields: dict[str, Any]) -> bytes:
    """Encode the annotation as it is stored. Raises TypeError or ValueError for values that JSON cannot represent."""
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _checked(picture: Picture) -> tuple[int, int]:
    """Decode an image, check that its content matches its extension, and return its size."""
    kind, _ = checked_header(picture.data)
    if kind != picture.format:
        raise BadSample(f"image is named {picture.format} but contains {kind}")
    return decode_image(picture.data).size


def _check_mask(mask: bytes, size: tuple[int, int] | None) -> None:
    check_mask_header(mask, size)
    with sample_context("mask"):
        decode_mask(mask)


def check_mask_header(mask: bytes, size: tuple[int, int] | None) -> None:
    """Check format and size of a mask without decoding it.

    Args:
        mask: the encoded mask.
        size: width and height of the first image, None for a sample without an image.

    Raises:
        BadSample: the mask does not fit the image.
    """
    if size is None:
        raise BadSample("a mask is given, but there is no image")
    with sample_context("mask"):
        kind, width, height = picture_header(mask)
    if kind != "png":
        raise BadSample(f"mask is {kind}; only PNG stores it without loss")
    if (width, height) != size:
        raise BadSample(f"mask has {width} x {height} pixels, the image {size[0]} x {size[1]}")
