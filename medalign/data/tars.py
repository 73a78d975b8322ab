"""What a tar holds, as rows of the index (see `listing`), whoever packed it."""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.decode import has_several_frames
from medalign.data.members import ANNOTATION, MASK_PNG, image_members
from medalign.data.records import KeySet, check_path_key, checked_header
from medalign.data.samples import BadSample, check_fields, image_name, naming, parse_fields
from medalign.errors import DataError

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

Place = tuple[int, int]  # offset and length in the tar, bytes


def rows_of_tar(
    path: Path, shard: int, seen: KeySet, refused: list[str], several: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each sample that keeps the schema, in order; of images the headers alone are read.

    Args:
        shard: the tar's number in its folder.
        seen: keys that are taken; grows by those of the rows.
        refused: grows by "tar/key: reason" of the others.
        several: grows by "tar/key" for each picture that has several frames, of which the first is read.

    Raises DataError for what is no tar.
    """
    with path.open("rb") as file:
        for key, members in _groups(path):
            try:
                check_path_key(key, seen)
                row, frames = _row(file, key, shard, members)
                several += [f"{path.name}/{key}"] * frames
                yield row
                seen.add(key)
            except BadSample as error:
                refused.append(f"{path.name}/{key}: {error}")


def _groups(path: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """Key, and places by extension, of each run of members with one key.

    As webdataset has it, the key ends at the first point of the base name, and what has no such point is no member.
    """
    key: str | None = None
    members: dict[str, Place] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                match = _MEMBER.fullmatch(info.name.removeprefix("./"))
                if not info.isfile() or match is None:
                    continue
                name, extension = match.groups()
                if name != key:
                    if key is not None:
                        yield key, members
                    key, members = name, {}
                members[extension.lower()] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a readable tar ({error}); copy it again or leave it out") from error
    if key is not None:
        yield key, members


def _row(file: io.BufferedReader, key: str, shard: int, members: dict[str, Place]) -> tuple[dict[str, Any], int]:
    """The row, and how many of its pictures have several frames."""
    if ANNOTATION not in members:
        raise BadSample(f"there is no {key}.{ANNOTATION} beside its other members")
    images = image_members(members)
    data = {}
    for extension in (*images, ANNOTATION, MASK_PNG):
        if extension in members:
            offset, length = members[extension]
            file.seek(offset)
            data[extension] = file.read(length)
    sizes = []
    for number, extension in enumerate(images):
        with naming(image_name(number, len(images))):
            sizes.append(checked_header(data[extension])[1])
    fields = parse_fields(data[ANNOTATION])
    check_fields(fields, sizes[0] if sizes else None)
    width, height = sizes[0] if sizes else (0, 0)
    answer = fields["report"] if fields["task"] == "report" else fields["answer"]
    row = {
        "key": key,
        "shard": shard,
        "task": fields["task"],
        "answer_type": fields.get("answer_type") or "",
        "width": width,
        "height": height,
        "text": [len(fields.get("question") or ""), len(answer)],
        "members": {name: [*members[name], zlib.crc32(content)] for name, content in data.items()},
    }
    return row, sum(has_several_frames(data[extension]) for extension in images)
