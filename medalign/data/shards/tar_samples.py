"""Turn the content of a tar, from this package or another tool, into rows of the index (see `listing`)."""

from __future__ import annotations

import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from medalign.data.samples.bad_sample import short_name
from medalign.data.samples.decode import SEVERAL_FRAMES, has_several_frames
from medalign.data.samples.sample import BadSample, check_fields, image_name, parse_fields, sample_context
from medalign.data.shards.listing import MAX_MEMBER_BYTES
from medalign.data.shards.members import (
    ANNOTATION,
    MASK_PNG,
    has_dotted_names,
    ignored_members,
    image_members,
    last_ending,
    may_be_image,
)
from medalign.data.shards.records import KeySet, check_mask_header, check_path_key, checked_header
from medalign.data.shards.tar_scan import TarMember, scan
from medalign.errors import DataError

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

Run = dict[str, TarMember]  # neighboring members of a key, by extension in lower case


@dataclass
class Findings:
    """What the tars of a folder contain in addition to the usable samples."""

    refused: list[str] = field(default_factory=list)  # "tar/key: reason"
    ignored: list[str] = field(default_factory=list)  # "tar: what is not read, or read from an unusual place"
    notes: Counter[str] = field(default_factory=Counter)  # number of samples per note
    without_annotation: KeySet = field(default_factory=KeySet)  # keys that lack an annotation in at least one tar
    without_image: KeySet = field(default_factory=KeySet)  # keys that lack an image in at least one tar


def rows_of_tar(path: Path, shard: int, seen: KeySet, findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield a row for each valid sample, in the order of their first members.

    The members of a sample may be anywhere in the tar. Only the headers of images are read.

    Args:
        path: the tar.
        shard: index of the tar in its folder.
        seen: keys that are already used; the keys of the rows are added.
        findings: refused samples and ignored members are added.

    Raises:
        DataError: the file is not a tar or is damaged, or image and annotation of a sample are in different tars.
    """
    samples, unnamed = _samples(scan(path, findings.ignored))
    orphans = _orphans(samples, unnamed)
    split: dict[str, list[Run]] = {}
    ignored: Counter[str] = Counter()
    with path.open("rb") as file:
        for key, runs in samples.items():
            if has_dotted_names([name for run in runs for name in run]):
                split[key] = runs
                continue
            try:
                for members in _joined(runs):
                    _require_one_tar(path, key, members, findings)
                    check_path_key(key, seen)
                    others = _ignored_members(key, members)
                    row, frames = _row(file, key, shard, members, orphans)
                    findings.notes.update([SEVERAL_FRAMES] * frames)
                    yield row
                    seen.add(key)
                    ignored.update(map(last_ending, others))
            except BadSample as error:
                findings.refused.append(f"{path.name}/{short_name(key)}: {error}")
    if split:
        findings.refused.append(f"{path.name}: {_explain_dotted_names(split)}")
    findings.ignored += [f"{path.name}: {note}" for note in _describe_ignored(unnamed, ignored)]


def _describe_ignored(unnamed: Sequence[str], ignored: Counter[str]) -> Iterator[str]:
    """Describe the members that are not read: names without an extension, and extensions with their counts."""
    if unnamed:
        yield f"{len(unnamed)} files without a name and an ending are not read; the first is {short_name(unnamed[0])}"
    if ignored:
        counts = ", ".join(f"{count} x {ending}" for ending, count in ignored.most_common())
        yield f"members with these endings are not read: {counts}"


def _samples(members: Sequence[TarMember]) -> tuple[dict[str, list[Run]], list[str]]:
    """Group the members by key into runs of neighbors, and list the files that belong to no sample.

    As in webdataset, the key ends at the first dot of the base name, and a file without a dot is not a member.
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


def _orphans(samples: dict[str, list[Run]], unnamed: Sequence[str]) -> dict[str, str]:
    """Files that may be the image of a sample.

    Files without an extension are listed by base name; the first image without an annotation is listed under "".
    """
    orphans = {posixpath.basename(name): name for name in unnamed}
    for runs in samples.values():
        names = {name: member.name for run in runs for name, member in run.items()}
        if ANNOTATION not in names and not has_dotted_names(names):
            image = next((path for name, path in names.items() if may_be_image(name)), None)
            if image:
                return {**orphans, "": image}
    return orphans


def _joined(runs: Sequence[Run]) -> Sequence[Run]:
    """Join the members of a key, or keep the runs if the same set of members occurs several times in a row.

    Raises:
        BadSample: a member occurs twice, and it is ambiguous which members belong together.
    """
    first = runs[0]
    if all(run.keys() == first.keys() for run in runs):
        return runs
    names = Counter(name for run in runs for name in run)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise BadSample(f"member {', '.join(twice)} occurs twice in the tar, and it is unclear which to use; keep one")
    return [{name: member for run in runs for name, member in run.items()}]


def _require_one_tar(path: Path, key: str, members: Run, findings: Findings) -> None:
    """Raise DataError if image and annotation of a sample are in different tars."""
    if ANNOTATION not in members:
        findings.without_annotation.add(key)
    elif not image_members(members):
        findings.without_image.add(key)
    if key in findings.without_annotation and key in findings.without_image:
        raise DataError(
            f"{path}: the members of {short_name(key)} are split between this tar and an earlier one; all members of "
            "a sample must be in one tar, so unpack both and pack them as one"
        )


def _ignored_members(key: str, members: Run) -> list[str]:
    """Return the extensions that are not read. Raises BadSample if the annotation is missing or one is unknown."""
    if ANNOTATION not in members:
        others = ", ".join(map(short_name, list(members)[:3])) + (", ..." if len(members) > 3 else "")
        dotted = "; a key ends at the first dot of the name" if any("." in name for name in members) else ""
        raise BadSample(f"there is no {short_name(key)}.{ANNOTATION} for its other members ({others}{dotted})")
    return ignored_members(key, members)


def _row(file: BinaryIO, key: str, shard: int, members: Run, orphans: dict[str, str]) -> tuple[dict[str, Any], int]:
    """Return the row, and the number of its images that have several frames."""
    images = image_members(members)
    if not images:
        _require_no_orphan(key, orphans)
    wanted = [name for name in (*images, ANNOTATION, MASK_PNG) if name in members]
    data = {name: _read(file, members[name]) for name in wanted}
    sizes = []
    for index, name in enumerate(images):
        with sample_context(image_name(index, len(images))):
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


def _require_no_orphan(key: str, orphans: dict[str, str]) -> None:
    """Raise BadSample for a sample without an image if the same tar contains an image without a sample."""
    image = orphans.get(posixpath.basename(key)) or orphans.get("")
    if image:
        raise BadSample(
            f"it has no image, and {short_name(image)} in the same tar has no annotation; give all members of a sample "
            "the same path up to the first dot, for example 0001.jpg and 0001.json, or leave the image out"
        )


def _read(file: BinaryIO, member: TarMember) -> bytes:
    """Return the bytes of a member. Raises BadSample if they cannot be read."""
    if member.fault:
        raise BadSample(f"member {short_name(member.name)} {member.fault}")
    if not 0 < member.length <= MAX_MEMBER_BYTES:
        raise BadSample(f"member {short_name(member.name)} has {member.length} bytes; 1 to {MAX_MEMBER_BYTES} are read")
    file.seek(member.offset)
    return file.read(member.length)


def _explain_dotted_names(split: dict[str, list[Run]]) -> str:
    """Explain why samples with dots in their names are not used, and the remedy."""
    members = [member for runs in split.values() for run in runs for member in run.values()]
    key = next(iter(split))
    return (
        f"{len(members)} files are not used because their names contain dots, for example "
        f"{short_name(members[0].name)}: a key ends at the first dot of the name, so this file and others would all "
        f"belong to the sample {short_name(key)!r}; replace the dots by another character, for example "
        "1-2-840.jpg instead of 1.2.840.jpg"
    )
