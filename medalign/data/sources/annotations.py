"""Annotation files: JSON, JSON lines and CSV, whatever tool has written them.

In the JSON of published data sets NaN, which pandas writes for a missing value, is read as null.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.packings import pointer
from medalign.data.samples import BadSample
from medalign.data.sources.texts import text
from medalign.errors import DataError, plain

HEAD = 32  # bytes of a file by which `encoding_problem` knows it
_LEVELS = 64  # of lists and objects in one another; Python's own tools end at a few hundred
_TOO_DEEP = f"lists and objects nest deeper than {_LEVELS} levels"
_DIGITS = 300  # of an integer; floats end at 308
_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CONVERT = "a file from Windows is converted with iconv -f WINDOWS-1252 -t UTF-8"
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Entry:
    """One sample of an annotation file."""

    place: str  # "train.json entry 0", counted from 0; in JSON lines "train.json line 1"
    value: Any
    problem: str = ""  # why it cannot be read

    def fields(self) -> dict[str, Any]:
        """The entry, an object. Raises BadSample for anything else."""
        if self.problem:
            raise BadSample(self.problem)
        if not isinstance(self.value, dict):
            raise BadSample(f"a JSON {type(self.value).__name__}, not an object")
        return self.value


def encoding_problem(head: bytes) -> str:
    """What is wrong with a file that begins so, with the remedy; "" for one that may be UTF-8."""
    if told := pointer(head):
        return f"is {told}"
    if head.startswith(b"\x1f\x8b"):
        return "is gzipped; unpack it with gunzip"
    if head.startswith(_UTF16 + _UTF32) or b"\0" in head[:4]:
        name = "UTF-32" if head.startswith(_UTF32) else "UTF-16"
        return f"is {name}; convert it to UTF-8, as with iconv -f {name} -t UTF-8"
    return ""


def decode_utf8(data: bytes) -> str:
    """The text, without a byte order mark. Raises BadSample that names the byte and the remedy."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise BadSample(f"not UTF-8 ({place}); {_CONVERT}") from error


def parse_json(content: str, *, nan_is_null: bool = False) -> Any:
    """A JSON value. Raises BadSample for what is not JSON, or nests too deep for any tool to handle.

    Args:
        nan_is_null: read NaN as null, and an integer that is longer than any float as infinity, which no field takes.
    """
    try:
        hooks: dict[str, Any] = {"parse_constant": _constant, "parse_int": _integer} if nan_is_null else {}
        return json.loads(content, **hooks)
    except RecursionError as error:
        raise BadSample(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise BadSample(f"not JSON ({error})") from error
    except ValueError as error:  # Python's own limit, whose remedy is not the user's
        raise BadSample("an integer has thousands of digits") from error


def check_depth(value: Any) -> None:
    """Raises BadSample for lists and objects that nest deeper than 64 levels."""
    if _exceeds(value, _LEVELS):
        raise BadSample(_TOO_DEEP)


def _exceeds(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_exceeds(one, levels - 1) for one in inner)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else math.copysign(math.inf, -1 if digits.startswith("-") else 1)


def read_json(path: Path) -> Any:
    """The value of a JSON file, NaN as null. Raises DataError that names the file."""
    return _parsed(path, read_text(path))


def _parsed(path: Path, content: str) -> Any:
    try:
        return parse_json(content, nan_is_null=True)
    except BadSample as error:
        raise DataError(f"{path} cannot be read: {error}; correct it, or fetch it again if it was cut short") from error


def read_entries(path: Path) -> list[Entry]:
    """The samples of a file that holds a JSON list, or one JSON object per line. Raises DataError that names the file.

    A file of JSON lines may be named `.json`. A line that cannot be read is an entry that says why.
    """
    content = read_text(path)
    if path.suffix in _LINES or _is_lines(content):
        lines = ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())
        return [_entry(f"{path.name} line {number}", line) for number, line in lines]
    value = _parsed(path, content)
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; a list of samples is needed{_inner_list(value)}")
    return [Entry(f"{path.name} entry {number}", one) for number, one in enumerate(value)]


def _inner_list(value: Any) -> str:
    """How to take the one list out of an object, as of {"data": [...]}."""
    names = [name for name, inner in value.items() if isinstance(inner, list)] if isinstance(value, dict) else []
    if len(names) != 1:
        return ""
    return f", such as the one under {names[0]!r}: take it out with jq '.[{json.dumps(names[0])}]'"


def _is_lines(content: str) -> bool:
    """Whether lines are objects of their own: more than one, and among the first hundred one that can be read."""
    head = [line.strip() for line in content.lstrip().split("\n", 100)[:100]]
    if len(head) < 2 or not (head[0].startswith("{") and head[0].endswith("}")):
        return False
    return any(not _entry("", line).problem for line in head if line)


def _entry(place: str, line: str) -> Entry:
    try:
        return Entry(place, parse_json(line, nan_is_null=True))
    except BadSample as error:
        return Entry(place, None, str(error))


def read_text(path: Path) -> str:
    """A file's text. Raises DataError that names the file for one that cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{plain(error)}; the file cannot be read") from error
    problem = encoding_problem(data[:HEAD])
    if problem:
        raise DataError(f"{path} {problem}")
    try:
        return decode_utf8(data)
    except BadSample as error:
        raise DataError(f"{path} is {error}") from error


def read_csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """These columns of each row of a CSV file, gzipped or not; "" for an empty cell, and for NaN.

    Raises DataError for a file that cannot be read or lacks a column.
    """
    gzipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            problem = encoding_problem(file.read(HEAD))
        if problem:
            raise DataError(f"{path} {problem}")
        with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            absent = [name for name in columns if name not in (rows.fieldnames or ())]
            if absent:
                raise DataError(f"{path} has no column {absent[0]!r}; its columns are {rows.fieldnames}")
            for row in rows:
                yield {name: text(row[name]) for name in columns}
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); {_CONVERT}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
