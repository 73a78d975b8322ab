r"""Format of WebDataset shards, and writing them. Only this file imports webdataset.

A shard folder contains `shard-000000.tar`, `shard-000001.tar`, ... and `index.jsonl` (see `listing`); a large one also
contains `index.bin` (see `mapped_table`). Each sample consists of a few neighboring members of one tar:

    KEY.jpg or KEY.png    the image as received (absent for a sample without an image)
    KEY.1.jpg, KEY.2.png  further images of the sample, in order; up to 64 images in total
    KEY.json              the annotation, one JSON object
    KEY.mask.png          optional; same size as the first image, nonzero inside the region

KEY is unique in its folder, has at most 80 bytes, and contains no '.', '/', '\' or white space. The image numbers have
no gap. Tars from other tools may differ (see `tar_scan` and `members`): the first image may be named KEY.0.jpg, images
may have the other usual extensions in upper or lower case, KEY may be a path such as train/0001.jpg with up to 255
bytes, and the members of a sample may be apart from each other or links to other members. Fields of the annotation:

    task         "vqa" or "report"
    question     required for vqa; for a report, "" selects the default prompt
    answer       required for vqa
    answer_type  "closed", "open", or "" if it is unknown (and for report); in upper or lower case
    report       the target text; required for report
    boxes        [[x0, y0, x1, y1], ...] in pixels of the upright first image as stored; may be empty
    split, case, and any other field  kept unchanged as metadata of the sample

Images are read as described in `decode`: the first of several frames, rotated upright by their EXIF orientation, and
transparent areas on white. Sizes in the index, boxes and masks refer to the upright images.

A sample that violates this schema is reported by name and never written. The bytes of the tars depend only on the
records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from medalign.data.samples.sample import BadSample
from medalign.data.shards.archives import describe_missing_tars, near_tars
from medalign.data.shards.index_file import IndexFile
from medalign.data.shards.members import ANNOTATION, MASK_PNG, image_member
from medalign.data.shards.output import replaced_folder, shard_name
from medalign.data.shards.records import KeySet, Record, Refused, check_record, json_bytes
from medalign.data.shards.tar_samples import Findings, rows_of_tar
from medalign.errors import ConfigError, DataError


@dataclass(frozen=True)
class PackReport:
    """Result of packing or indexing."""

    written: int
    shards: int
    refused: tuple[str, ...]  # "key: reason"
    notes: Mapping[str, int] = field(default_factory=dict)  # number of samples per note
    ignored: tuple[str, ...] = ()  # "tar: what is not read, or read from an unusual place"


def write_shards(
    records: Iterable[Record | Refused],
    output: Path,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
    allow_empty: bool = False,
) -> PackReport:
    """Write the valid records as shards with their index.

    The folder appears atomically: everything is first written to a hidden folder next to it. An existing shard folder
    with this name is replaced; a folder that contains anything else is not touched.

    Args:
        records: the samples, and those that could not be turned into records.
        output: the folder to write.
        samples_per_shard: samples of each tar; the last one may have fewer.
        progress: called with the number of samples written so far.
        allow_empty: whether an index without rows is written if there is no valid record.

    Returns:
        What was written and what was refused.

    Raises:
        ConfigError: `samples_per_shard` is below 1.
        DataError: `output` cannot be replaced, no record is valid, or the disk fails.
    """
    output = Path(output).absolute()
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
    refused: list[str] = []
    notes: Counter[str] = Counter()
    with replaced_folder(output) as partial, IndexFile(partial) as index:
        valid = _valid_records(records, refused, notes)
        _write_tars(valid, partial, samples_per_shard, progress, index)
        if not index.samples and not allow_empty:
            first = "; ".join(refused[:3]) or "there was no record"
            raise DataError(f"no valid sample for {output} ({len(refused)} refused): {first}")
    return PackReport(index.samples, len(index.shards), tuple(refused), notes)


def build_index(folder: Path) -> PackReport:
    """Write the index of tars that another tool packed, in the order of their names. The tars are only read.

    Samples that violate the schema get no row and are listed as refused. Without any valid sample no index is written.

    Raises:
        DataError: the folder contains no tar, or a tar cannot be read to its end.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} {describe_missing_tars(folder)}")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is a folder or a broken link; restore it or leave it out")
    findings, seen = Findings(), KeySet()
    with IndexFile(folder, allow_empty=False) as index:
        for shard, path in enumerate(paths):
            index.add(path, rows_of_tar(path, shard, seen, findings))
    others = [f"{folder.name} contains other files than .tar, not read: {other}" for other in near_tars(folder)]
    ignored = (*findings.ignored, *others)
    return PackReport(index.samples, len(index.shards), tuple(findings.refused), findings.notes, ignored)


def _valid_records(records: Iterable[Record | Refused], refused: list[str], notes: Counter[str]) -> Iterator[Record]:
    """Yield the valid records; reasons and notes are added to `refused` and `notes`."""
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
        shard = len(index.shards)
        path = folder / shard_name(shard)
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            for _ in range(samples_per_shard):
                tar.write(_members(pending))
                written += 1
                if progress:
                    progress(written)
                pending = next(records, None)
                if pending is None:
                    break
        index.add(path, rows_of_tar(path, shard, KeySet(), Findings()))


def _members(record: Record) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": record.key, ANNOTATION: json_bytes(record.fields)}
    for index, picture in enumerate(record.images):
        members[image_member(index, picture.format)] = picture.data
    if record.mask is not None:
        members[MASK_PNG] = record.mask
    return members
