"""WebDataset tars and how they are written: the only door to webdataset.

A shard folder holds `shard-000000.tar`, `shard-000001.tar`, ... and `index.jsonl` (see `table`). Each sample is two
or three neighbouring members of one tar:

    KEY.jpg or KEY.png    the image, as it came (left out for a sample without image)
    KEY.json              the annotation, one JSON object
    KEY.mask.png          optional; same size as the image, not zero inside the region

KEY is unique in its folder, at most 80 bytes, without '.', '/', '\\' or white space. Fields of the annotation:

    task         "vqa" or "report"
    question     what is asked; needed for vqa; for report "" asks the default prompt
    answer       needed for vqa
    answer_type  "closed", "open", or "" where it is not known (and for report)
    report       the text to be written; needed for report
    boxes        [[x0, y0, x1, y1], ...] in pixels of the stored image; may be empty
    split, case, and anything else  kept as they are, as the sample's metadata

What breaks this schema is refused by name and never written. The bytes of the tars depend on the records alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from webdataset import TarWriter

from medalign.data.samples import BadSample, check_fields, decode_image, parse_fields, picture_header
from medalign.data.table import FORMAT, INDEX_NAME, LARGE, LONGEST, TABLE_NAME, VERSION, read_table
from medalign.errors import ConfigError, DataError

_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_BAD_KEY = re.compile(r"[./\\\s\x00-\x1f]|^__|^$")
_OURS = (INDEX_NAME, TABLE_NAME)
_PICTURES = ("jpg", "jpeg", "png", "dcm")
_LONGEST_KEY = 80  # bytes; tar's plain header holds names of 100


@dataclass(frozen=True)
class Record:
    """One sample, encoded, on its way into a shard."""

    key: str
    image: bytes | None  # the encoded file; None for a sample without image
    image_format: Literal["png", "jpg"]
    fields: dict[str, Any]  # the annotation, see the module's schema
    mask: bytes | None = None  # an encoded PNG


@dataclass(frozen=True)
class Refused:
    """What a source could not even make a record of; `write_shards` only lists it."""

    name: str  # the sample's key, or file and line
    reason: str


@dataclass(frozen=True)
class PackReport:
    """What became of the records."""

    written: int
    shards: int
    refused: tuple[str, ...]  # "key: reason"


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
        valid = _valid_records(records, refused)
        shards = _write_tars(valid, partial, samples_per_shard, progress)
        if not shards and not allow_empty:
            first = "; ".join(refused[:3]) or "there was no record at all"
            raise DataError(f"no valid sample for {output} ({len(refused)} refused): {first}")
        rows = [row for _, shard_rows in shards for row in shard_rows]
        _write_index(partial, shards)
        _move_into_place(partial, output)
    except OSError as error:
        raise DataError(f"packing into {output} stopped, nothing was written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PackReport(len(rows), len(shards), tuple(refused))


def join_shards(parts: Sequence[Path], output: Path) -> PackReport:
    """One shard folder from several, their shards and rows in the order of `parts` under new numbers.

    The tars are hard links where the file system has them, else copies; the parts stay as they are. The output
    appears whole or not at all, as in `write_shards`. Raises DataError for no sample in all parts.
    """
    output = Path(output).absolute()
    require_replaceable(output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    shards: list[tuple[Path, list[dict[str, Any]]]] = []
    try:
        partial.mkdir(parents=True)
        for part in parts:
            header, *rows = map(json.loads, (part / INDEX_NAME).read_text(encoding="utf-8").splitlines())
            first = len(shards)
            for number, shard in enumerate(header["shards"]):
                path = partial / f"shard-{first + number:06d}.tar"
                _link(part / shard["name"], path)
                shards.append((path, [{**row, "shard": first + number} for row in rows if row["shard"] == number]))
        if not shards:
            raise DataError(f"no valid sample for {output}")
        _write_index(partial, shards)
        _move_into_place(partial, output)
    except OSError as error:
        raise DataError(f"packing into {output} stopped, nothing was written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PackReport(sum(len(rows) for _, rows in shards), len(shards), ())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here; a copy is as good, it only takes longer
        shutil.copyfile(source, target)


def build_index(folder: Path) -> PackReport:
    """Write the index of tars that something else packed, in the order of their names; the tars are only read.

    Samples that break the schema get no row and are listed as refused.
    """
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar file; name a folder of WebDataset shards")
    refused: list[str] = []
    seen: set[str] = set()
    shards = [(path, list(_rows_of_tar(path, number, seen, refused))) for number, path in enumerate(paths)]
    _write_index(Path(folder), shards)
    return PackReport(sum(len(rows) for _, rows in shards), len(shards), tuple(refused))


def _valid_records(records: Iterable[Record | Refused], refused: list[str]) -> Iterator[Record]:
    seen: set[str] = set()
    for record in records:
        if isinstance(record, Refused):
            refused.append(f"{record.name}: {record.reason}")
            continue
        try:
            _check_record(record, seen)
        except BadSample as error:
            refused.append(f"{record.key}: {error}")
            continue
        seen.add(record.key)
        yield record


def _check_record(record: Record, seen: set[str]) -> None:
    _check_key(record.key, seen)
    size = None
    if record.image is not None:
        found, *_ = picture_header(record.image)
        if found != record.image_format:
            raise BadSample(f"image is named {record.image_format} but holds {found}")
        size = decode_image(record.image).size
    check_fields(record.fields, size)
    if record.mask is not None:
        _check_mask(record.mask, size)
    try:
        _json_bytes(record.fields)
    except (TypeError, ValueError) as error:
        raise BadSample(f"annotation cannot be written as JSON ({error})") from error


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


def _check_key(key: str, seen: set[str]) -> None:
    if _BAD_KEY.search(key) or len(key.encode()) > _LONGEST_KEY:
        raise BadSample(f"key {key!r} must have 1 to {_LONGEST_KEY} bytes, without '.', '/', '\\', white space")
    if key in seen:
        raise BadSample("key occurs a second time; keys must be unique")


def _json_bytes(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _write_tars(
    records: Iterator[Record], folder: Path, samples_per_shard: int, progress: Callable[[int], object] | None
) -> list[tuple[Path, list[dict[str, Any]]]]:
    shards: list[tuple[Path, list[dict[str, Any]]]] = []
    written = 0
    pending = next(records, None)
    while pending is not None:
        path = folder / f"shard-{len(shards):06d}.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            for _ in range(samples_per_shard):
                tar.write(_members(pending))
                written += 1
                if progress:
                    progress(written)
                pending = next(records, None)
                if pending is None:
                    break
        shards.append((path, list(_rows_of_tar(path, len(shards), set(), []))))
    return shards


def _members(record: Record) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": record.key, "json": _json_bytes(record.fields)}
    if record.image is not None:
        members[record.image_format] = record.image
    if record.mask is not None:
        members["mask.png"] = record.mask
    return members


def _rows_of_tar(path: Path, shard: int, seen: set[str], refused: list[str]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for key, members in _groups(path):
            try:
                _check_key(key, seen)
                yield _row(file, key, shard, members)
                seen.add(key)
            except BadSample as error:
                refused.append(f"{path.name}/{key}: {error}")


def _groups(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key, and offset and length by extension, of each run of members with one key."""
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                name, _, extension = info.name.removeprefix("./").partition(".")
                if name != key:
                    if key is not None:
                        yield key, members
                    key, members = name, {}
                members[extension.lower()] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a readable tar ({error}); copy it again or leave it out") from error
    if key is not None:
        yield key, members


def _row(file: io.BufferedReader, key: str, shard: int, members: dict[str, tuple[int, int]]) -> dict[str, Any]:
    data = {}
    for extension in (*_PICTURES, "json", "mask.png"):
        if extension in members:
            offset, length = members[extension]
            file.seek(offset)
            data[extension] = file.read(length)
    if "json" not in data:
        raise BadSample(f"there is no {key}.json beside its other members")
    images = [extension for extension in data if extension in _PICTURES]
    if len(images) > 1:
        raise BadSample(f"there are several images ({', '.join(images)}); one is read")
    width, height = picture_header(data[images[0]])[1:] if images else (0, 0)
    if max(width, height) > LONGEST:
        raise BadSample(f"image has {width} x {height} pixels; at most {LONGEST} a side are read")
    fields = parse_fields(data["json"])
    check_fields(fields, (width, height) if images else None)
    answer = fields["report"] if fields["task"] == "report" else fields["answer"]
    return {
        "key": key,
        "shard": shard,
        "task": fields["task"],
        "answer_type": fields.get("answer_type") or "",
        "width": width,
        "height": height,
        "text": [len(fields.get("question") or ""), len(answer)],
        "members": {name: [*members[name], zlib.crc32(content)] for name, content in data.items()},
    }


def _write_index(folder: Path, shards: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    listing = [{"name": path.name, "bytes": path.stat().st_size, "samples": len(rows)} for path, rows in shards]
    total = sum(len(rows) for _, rows in shards)
    header = {"format": FORMAT, "version": VERSION, "checksum": "0" * 8, "samples": total, "shards": listing}
    partial = folder / f".{INDEX_NAME}.partial"
    checksum = 0
    with partial.open("wb") as file:
        file.write(_line(header))  # holds the place until the checksum is known
        for line in (_line(row) for _, rows in shards for row in rows):
            checksum = zlib.crc32(line, checksum)
            file.write(line)
        file.seek(0)
        file.write(_line({**header, "checksum": f"{checksum:08x}"}))
    partial.replace(folder / INDEX_NAME)
    if total >= LARGE:
        read_table(folder)  # makes the mapped form too, once for all who open it


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


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
