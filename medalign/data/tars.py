"""What a tar holds, as rows of the index (see `listing`), whoever packed it."""

from __future__ import annotations

import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from medalign.data.bad_sample import shown
from medalign.data.decode import SEVERAL_FRAMES, has_several_frames
from medalign.data.listing import LARGEST
from medalign.data.members import (
    ANNOTATION,
    MASK_PNG,
    image_members,
    last_ending,
    may_be_image,
    passed_over,
    split_at_points,
)
from medalign.data.records import KeySet, check_mask_header, check_path_key, checked_header
from medalign.data.samples import BadSample, check_fields, image_name, naming, parse_fields
from medalign.data.scan import Member, scan
from medalign.errors import DataError

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

Run = dict[str, Member]  # by extension, in small letters


@dataclass
class Findings:
    """What the tars of a folder hold beside the samples that are used."""

    refused: list[str] = field(default_factory=list)  # "tar/key: reason"
    passed_over: list[str] = field(default_factory=list)  # "tar: what is not read, or read from an unusual place"
    notes: Counter[str] = field(default_factory=Counter)  # how often each note of the samples occurs
    without_annotation: KeySet = field(default_factory=KeySet)  # keys that have no annotation in some tar
    without_image: KeySet = field(default_factory=KeySet)  # keys of rows


def rows_of_tar(path: Path, shard: int, seen: KeySet, findings: Findings) -> Iterator[dict[str, Any]]:
    """A row for each sample that keeps the schema, in the order of their first members.

    Members of one sample may stand anywhere in the tar. Of images the headers alone are read.

    Args:
        shard: the tar's number in its folder.
        seen: keys that are taken; grows by those of the rows.
        findings: grows by what is refused, and what is passed over.

    Raises DataError for what is no tar, for a damaged one, and where image and annotation stand in different tars.
    """
    samples, unnamed = _samples(scan(path, findings.passed_over))
    lost = _lost(samples, unnamed)
    split: dict[str, list[Run]] = {}
    passed: Counter[str] = Counter()
    with path.open("rb") as file:
        for key, runs in samples.items():
            if split_at_points([name for run in runs for name in run]):
                split[key] = runs
                continue
            try:
                for members in _joined(runs):
                    _require_one_tar(path, key, members, findings)
                    check_path_key(key, seen)
                    others = _passed_over(key, members)
                    row, frames = _row(file, key, shard, members, lost)
                    findings.notes.update([SEVERAL_FRAMES] * frames)
                    yield row
                    seen.add(key)
                    passed.update(map(last_ending, others))
            except BadSample as error:
                findings.refused.append(f"{path.name}/{shown(key)}: {error}")
    if split:
        findings.refused.append(f"{path.name}: {_why_split(split)}")
    findings.passed_over += [f"{path.name}: {note}" for note in _not_read(unnamed, passed)]


def _not_read(unnamed: Sequence[str], passed: Counter[str]) -> Iterator[str]:
    """What stands in a tar beside the members that are read: names without ending, and endings with their counts."""
    if unnamed:
        yield f"{len(unnamed)} files without name and ending are not read, the first is {shown(unnamed[0])}"
    if passed:
        told = ", ".join(f"{count} x {ending}" for ending, count in passed.most_common())
        yield f"members of these endings are not read: {told}"


def _samples(members: Sequence[Member]) -> tuple[dict[str, list[Run]], list[str]]:
    """The members of each key, in runs of neighbors, and the files that belong to none.

    As webdataset has it, the key ends at the first point of the base name, and what has no such point is no member.
    """
    samples: dict[str, list[Run]] = {}
    unnamed: list[str] = []
    last = None
    for member in members:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            unnamed.append(member.name)
            continue
        key, extension = match[1], match[2].lower()
        runs = samples.setdefault(key, [])
        if key != last or extension in runs[-1]:
            runs.append({})
        runs[-1][extension] = member
        last = key
    return samples, unnamed


def _lost(samples: dict[str, list[Run]], unnamed: Sequence[str]) -> dict[str, str]:
    """Files that may be a sample's image, by base name: those without ending; and under "" one without annotation."""
    lost = {posixpath.basename(name): name for name in unnamed}
    for runs in samples.values():
        names = {name: member.name for run in runs for name, member in run.items()}
        if ANNOTATION not in names and not split_at_points(names):
            image = next((path for name, path in names.items() if may_be_image(name)), None)
            if image:
                return {**lost, "": image}
    return lost


def _joined(runs: Sequence[Run]) -> Sequence[Run]:
    """The members of a key in one piece, or as many as were packed one after another.

    Raises BadSample where a member occurs twice and it is open which of them belong together.
    """
    first = runs[0]
    if all(run.keys() == first.keys() for run in runs):
        return runs
    names = Counter(name for run in runs for name in run)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise BadSample(f"member {', '.join(twice)} occurs twice in the tar, and it is open which to use; keep one")
    return [{name: member for run in runs for name, member in run.items()}]


def _require_one_tar(path: Path, key: str, members: Run, findings: Findings) -> None:
    """Raises DataError where the image of a sample stands in one tar and its annotation in another."""
    if ANNOTATION not in members:
        findings.without_annotation.add(key)
    elif not image_members(members):
        findings.without_image.add(key)
    if key in findings.without_annotation and key in findings.without_image:
        raise DataError(
            f"{path}: the members of {shown(key)} are divided between this tar and an earlier one, its annotation here "
            "or there; all members of a sample stand in one tar, so unpack both and pack them as one"
        )


def _passed_over(key: str, members: Run) -> list[str]:
    """The extensions that are not read. Raises BadSample where the annotation lacks or one is not known."""
    if ANNOTATION not in members:
        beside = ", ".join(map(shown, list(members)[:3])) + (", ..." if len(members) > 3 else "")
        pointed = "; a key ends at the first point of the name" if any("." in name for name in members) else ""
        raise BadSample(f"there is no {shown(key)}.{ANNOTATION} beside its other members ({beside}{pointed})")
    return passed_over(key, members)


def _row(file: BinaryIO, key: str, shard: int, members: Run, lost: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The row, and how many of its pictures have several frames."""
    images = image_members(members)
    if not images:
        _require_none_lost(key, lost)
    wanted = [name for name in (*images, ANNOTATION, MASK_PNG) if name in members]
    data = {name: _read(file, members[name]) for name in wanted}
    sizes = []
    for number, name in enumerate(images):
        with naming(image_name(number, len(images))):
            sizes.append(checked_header(data[name])[1])
    fields = parse_fields(data[ANNOTATION])
    check_fields(fields, sizes[0] if sizes else None, len(sizes))
    if MASK_PNG in data:
        check_mask_header(data[MASK_PNG], sizes[0] if sizes else None)
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
        "members": {
            name: [members[name].offset, members[name].length, zlib.crc32(content)] for name, content in data.items()
        },
    }
    return row, sum(has_several_frames(data[name]) for name in images)


def _require_none_lost(key: str, lost: dict[str, str]) -> None:
    """Raises BadSample for a sample without image in a tar that holds one without sample."""
    image = lost.get(posixpath.basename(key)) or lost.get("")
    if image:
        raise BadSample(
            f"it has no image, and {shown(image)} in the same tar has no annotation; name all members of a sample "
            "alike up to the first point, folders included, as 0001.jpg and 0001.json, or leave the image out"
        )


def _read(file: BinaryIO, member: Member) -> bytes:
    """A member's bytes. Raises BadSample for one that has none."""
    if member.fault:
        raise BadSample(f"member {shown(member.name)} {member.fault}")
    if not 0 < member.length <= LARGEST:
        raise BadSample(f"member {shown(member.name)} has {member.length} bytes; 1 to {LARGEST} are read")
    file.seek(member.offset)
    return file.read(member.length)


def _why_split(split: dict[str, list[Run]]) -> str:
    """Why these samples are lost, and what to do."""
    members = [member for runs in split.values() for run in runs for member in run.values()]
    key = next(iter(split))
    return (
        f"{len(members)} files are not used, for there are points in their names, as in {shown(members[0].name)}: a "
        f"key ends at the first point of the name, so that this one and others would all belong to the sample "
        f"{shown(key)!r}; rename them with another sign for the point, such as 1-2-840.jpg for 1.2.840.jpg"
    )
