"""WebDataset tars and how they are written: the only door to webdataset.

A shard folder holds `shard-000000.tar`, `shard-000001.tar`, ... and `index.jsonl` (see `listing`; a large one also
`index.bin`, see `table`). Each sample is a few neighbouring members of one tar:

    KEY.jpg or KEY.png    the image, as it came (left out for a sample without image)
    KEY.1.jpg, KEY.2.png  further images of the sample, in the order of their numbers; up to 64 images in all
    KEY.json              the annotation, one JSON object
    KEY.mask.png          optional; same size as the (first) image, not zero inside the region

KEY is unique in its folder, at most 80 bytes, without '.', '/', '\\' or white space. The images' numbers leave no gap.
Tars from other tools may hold more (see `scan` and `members`): the first image may be named KEY.0.jpg, images may have
the other usual endings in letters of any size, KEY may be a path, as in train/0001.jpg, up to 255 bytes long, and the
members of a sample may stand apart, or be links to other members. Fields of the annotation:

    task         "vqa" or "report"
    question     what is asked; needed for vqa; for report "" asks the default prompt
    answer       needed for vqa
    answer_type  "closed", "open", or "" where it is not known (and for report), in letters of any size
    report       the text to be written; needed for report
    boxes        [[x0, y0, x1, y1], ...] in pixels of the (first) image as stored and upright; may be empty
    split, case, and anything else  kept as they are, as the sample's metadata

Images are read as `decode` says: the first of several frames, upright by their EXIF orientation, on white where they
are transparent. Sizes in the index, boxes and masks are those of upright images.

What breaks this schema is refused by name and never written. The bytes of the tars depend on the records alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from medalign.data.index_file import IndexFile
from medalign.data.listing import INDEX_NAME
from medalign.data.members import ANNOTATION, MASK_PNG, image_member
from medalign.data.packings import near_tars, without_tars
from medalign.data.records import KeySet, Record, Refused, check_record, json_bytes
from medalign.data.samples import BadSample
from medalign.data.table import TABLE_NAME
from medalign.data.tars import Findings, rows_of_tar
from medalign.errors import ConfigError, DataError

_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_OURS = (INDEX_NAME, TABLE_NAME)


@dataclass(frozen=True)
class PackReport:
    """What became of the records."""

    written: int
    shards: int
    refused: tuple[str, ...]  # "key: reason"
    notes: Mapping[str, int] = field(default_factory=dict)  # how often each note of the samples occurs
    passed_over: tuple[str, ...] = ()  # "tar: what is not read, or read from an unusual place"


def write_shards(
    records: Iterable[Record | Refused],
    output: Path,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
    allow_empty: bool = False,
) -> PackReport:
    """Write the valid records as shards with their index; `progress` is called with the count written so far.

    The folder appears whole or not at all: everything goes to a hidden neighbour first. An older shard folder of the
    same name is replaced; a folder that holds anything else is left alone. Raises DataError for that, for no valid
    record (unless `allow_empty`: an index without rows is then written), and where the disk fails.
    """
    output = Path(output).absolute()
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
    require_replaceable(output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        refused: list[str] = []
        notes: Counter[str] = Counter()
        valid = _valid_records(records, refused, notes)
        with IndexFile(partial) as index:
            _write_tars(valid, partial, samples_per_shard, progress, index)
            if not index.samples and not allow_empty:
                first = "; ".join(refused[:3]) or "there was no record at all"
                raise DataError(f"no valid sample for {output} ({len(refused)} refused): {first}")
        _move_into_place(partial, output)
    except OSError as error:
        raise DataError(f"packing into {output} stopped, nothing was written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PackReport(index.samples, len(index.shards), tuple(refused), notes)


def join_shards(parts: Sequence[Path], output: Path) -> PackReport:
    """One shard folder from several, their shards and rows in the order of `parts` under new numbers.

    The tars are hard links where the file system has them, else copies; the parts stay as they are. The output
    appears whole or not at all, as in `write_shards`. Raises DataError for no sample in all parts.
    """
    output = Path(output).absolute()
    require_replaceable(output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        with IndexFile(partial) as index:
            for part in parts:
                _add_part(part, partial, index)
            if not index.shards:
                raise DataError(f"no valid sample for {output}")
        _move_into_place(partial, output)
    except OSError as error:
        raise DataError(f"packing into {output} stopped, nothing was written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PackReport(index.samples, len(index.shards), ())


def _add_part(part: Path, output: Path, index: IndexFile) -> None:
    """Link the part's shards under the next numbers, and add their rows."""
    with (part / INDEX_NAME).open(encoding="utf-8") as lines:
        for shard in json.loads(next(lines))["shards"]:
            number = len(index.shards)
            path = output / f"shard-{number:06d}.tar"
            _link(part / shard["name"], path)
            index.add(path, ({**json.loads(row), "shard": number} for row in islice(lines, shard["samples"])))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here; a copy is as good, it only takes longer
        shutil.copyfile(source, target)


def build_index(folder: Path) -> PackReport:
    """Write the index of tars that something else packed, in the order of their names; the tars are only read.

    Samples that break the schema get no row and are listed as refused; without any sample no index is written.
    Raises DataError for a folder without tars, and for a tar that cannot be read to its end.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} {without_tars(folder)}")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is a folder, or a link to a file that is gone; restore it or leave it out")
    findings, seen = Findings(), KeySet()
    with IndexFile(folder, allow_empty=False) as index:
        for number, path in enumerate(paths):
            index.add(path, rows_of_tar(path, number, seen, findings))
    others = [f"{folder.name} holds more than .tar files, not read: {other}" for other in near_tars(folder)]
    passed_over = (*findings.passed_over, *others)
    return PackReport(index.samples, len(index.shards), tuple(findings.refused), findings.notes, passed_over)


def _valid_records(records: Iterable[Record | Refused], refused: list[str], notes: Counter[str]) -> Iterator[Record]:
    """The records that keep the schema; `refused` and `notes` grow by what is said of the others and of these."""
    seen = KeySet()
    for record in records:
        if isinstance(record, Refused):
            refused.append(f"{record.name}: {record.reason}")
            continue
        try:
            check_record(record, seen)
        except BadSample as error:
            refused.append(f"{record.key}: {error}")
            continue
        seen.add(record.key)
        notes.update(record.all_notes())
        yield record


def _write_tars(
    records: Iterator[Record],
    folder: Path,
    samples_per_shard: int,
    progress: Callable[[int], object] | None,
    index: IndexFile,
) -> None:
    written = 0
    pending = next(records, None)
    while pending is not None:
        number = len(index.shards)
        path = folder / f"shard-{number:06d}.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            for _ in range(samples_per_shard):
                tar.write(_members(pending))
                written += 1
                if progress:
                    progress(written)
                pending = next(records, None)
                if pending is None:
                    break
        index.add(path, rows_of_tar(path, number, KeySet(), Findings()))


def _members(record: Record) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": record.key, ANNOTATION: json_bytes(record.fields)}
    for number, picture in enumerate(record.images):
        members[image_member(number, picture.format)] = picture.data
    if record.mask is not None:
        members[MASK_PNG] = record.mask
    return members


def require_replaceable(output: Path) -> None:
    """Raises DataError where shards cannot be put: a file, or a folder that holds anything but shards."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"{output} is a file; name a folder for the shards")
    foreign = [p.name for p in sorted(output.iterdir()) if p.name not in _OURS and not _SHARD_NAME.fullmatch(p.name)]
    if foreign:
        raise DataError(f"{output} holds {foreign[0]!r}, which is no shard; name an empty or a new folder")


def _move_into_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old)
