"""Samples on their way into a shard, and the checks that each must pass. The schema stands in `shards`."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from medalign.data.listing import LONGEST
from medalign.data.members import MOST_IMAGES
from medalign.data.samples import BadSample, check_fields, decode_image, image_name, naming, picture_header

_BAD_KEY = re.compile(r"[./\\\s\x00-\x1f]|^__|^$")
_LONGEST_KEY = 80  # bytes; tar's plain header holds names of 100


@dataclass(frozen=True)
class Picture:
    """One image, encoded."""

    data: bytes  # the file's content
    format: Literal["png", "jpg"]


@dataclass(frozen=True)
class Record:
    """One sample, encoded, on its way into a shard."""

    key: str
    images: tuple[Picture, ...]  # in order; empty for a sample without image
    fields: dict[str, Any]  # the annotation, see the schema
    mask: bytes | None = None  # an encoded PNG, of the first image


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
    check_fields(record.fields, size)
    if record.mask is not None:
        _check_mask(record.mask, size)
    try:
        json_bytes(record.fields)
    except (TypeError, ValueError) as error:
        raise BadSample(f"annotation cannot be written as JSON ({error})") from error


def check_key(key: str, seen: Container[str]) -> None:
    """Raises BadSample for a key that cannot be a member's name, or is taken."""
    if _BAD_KEY.search(key) or len(key.encode()) > _LONGEST_KEY:
        raise BadSample(f"key {key!r} must have 1 to {_LONGEST_KEY} bytes, without '.', '/', '\\', white space")
    if key in seen:
        raise BadSample("key occurs a second time; keys must be unique")


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
    if size is None:
        raise BadSample("a mask is given, but there is no image")
    try:
        kind, width, height = picture_header(mask)
        decode_image(mask)
    except BadSample as error:
        raise BadSample(f"mask: {error}") from error
    if kind != "png":
        raise BadSample(f"mask is {kind}; only PNG keeps it exact")
    if (width, height) != size:
        raise BadSample(f"mask has {width} x {height} pixels, the image {size[0]} x {size[1]}")
