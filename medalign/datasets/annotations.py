"""Read annotation files in JSON, JSON lines and CSV from various tools.

In JSON files of published data sets, NaN, which pandas writes for a missing value, is read as null.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medalign.data.samples.json_fields import unique_fields
from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Refused
from medalign.datasets.text_files import CONVERT, HEAD_BYTES, encoding_problem, read_text
from medalign.datasets.texts import text
from medalign.errors import DataError

Parsed = TypeVar("Parsed")

_LEVELS = 64  # nesting of lists and objects; Python's own functions fail at a few hundred
_TOO_DEEP = f"lists and objects are nested deeper than {_LEVELS} levels"
_DIGITS = 300  # of an integer; the largest float has 309
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Entry:
    """One sample of an annotation file."""

    location: str  # "train.json entry 0", counted from 0; in JSON lines "train.json line 1"
    value: Any
    problem: str = ""  # why it cannot be read

    def fields(self) -> dict[str, Any]:
        """Return the entry if it is an object. Raises BadSample otherwise."""
        if self.problem:
            raise BadSample(self.problem)
        if not isinstance(self.value, dict):
            raise BadSample(f"it is a JSON {type(self.value).__name__}, not an object")
        return self.value


def parse_json(content: str, *, nan_is_null: bool = False) -> Any:
    """Parse a JSON value.

    Args:
        content: the text.
        nan_is_null: read NaN as null, and an integer longer than any float as infinity, which all fields reject.

    Raises:
        BadSample: the text is not JSON, nested too deep, or a field occurs twice.
    """
    try:
        hooks: dict[str, Any] = {"parse_constant": _constant, "parse_int": _integer} if nan_is_null else {}
        return json.loads(content, object_pairs_hook=unique_fields, **hooks)
    except RecursionError as error:
        raise BadSample(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise BadSample(f"not JSON ({error})") from error
    except ValueError as error:  # Python's limit; its message gives a remedy that does not help the user
        raise BadSample("an integer has thousands of digits") from error


def check_depth(value: Any) -> None:
    """Raise BadSample if lists and objects are nested deeper than 64 levels."""
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
    """Read a JSON file, NaN as null. Raises DataError with the name of the file."""
    return _parsed(path, read_text(path))


def _parsed(path: Path, content: str) -> Any:
    try:
        return parse_json(content, nan_is_null=True)
    except BadSample as error:
        raise DataError(f"{path} cannot be read: {error}; correct it, or download it again") from error


def read_entries(path: Path) -> list[Entry]:
    """Read the samples of a file that contains a JSON list, or one JSON object per line.

    A file with JSON lines may also be named `.json`. A line that cannot be read becomes an entry with a `problem`.

    Raises:
        DataError: the file cannot be read. The message contains its name.
    """
    content = read_text(path)
    if path.suffix in _LINES or _is_lines(content):
        lines = ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())
        return [_entry(f"{path.name} line {number}", line) for number, line in lines]
    value = _parsed(path, content)
    if not isinstance(value, list):
        raise DataError(
            f"{path} contains a JSON {type(value).__name__}; it must be a list of samples{_inner_list(value)}"
        )
    return [Entry(f"{path.name} entry {number}", one) for number, one in enumerate(value)]


def read_files(
    paths: Iterable[Path], read: Callable[[Path], list[Entry]] = read_entries
) -> Iterator[tuple[Path, list[Entry]]]:
    """Yield each file with its samples, after all files have been read.

    Args:
        paths: the files.
        read: reads one file. Raises DataError if it cannot be read.

    Raises:
        DataError: some files cannot be read. The message has one line per file.
    """
    files: list[tuple[Path, list[Entry]]] = []
    problems: list[str] = []
    for path in paths:
        try:
            files.append((path, read(path)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    yield from files


def parse_entries(entries: Iterable[Entry], parse: Callable[[dict[str, Any]], Parsed]) -> Iterator[Parsed | Refused]:
    """Yield the result of `parse` for the fields of each entry, or the location of the entry and why it is refused.

    Args:
        entries: the samples of a file.
        parse: parses the fields of one entry. Raises BadSample if they cannot be used.
    """
    for entry in entries:
        try:
            parsed = parse(entry.fields())
        except BadSample as error:
            yield Refused(entry.location, str(error))
        else:
            yield parsed


def _inner_list(value: Any) -> str:
    """Explain how to extract the only list of an object such as {"data": [...]}, or return ""."""
    names = [name for name, inner in value.items() if isinstance(inner, list)] if isinstance(value, dict) else []
    if len(names) != 1:
        return ""
    return f", such as the one under {names[0]!r}: extract it with jq '.[{json.dumps(names[0])}]'"


def _is_lines(content: str) -> bool:
    """Return whether the text has several lines, and at least one of the first hundred is a complete object."""
    head = [line.strip() for line in content.lstrip().split("\n", 100)[:100]]
    if len(head) < 2 or not (head[0].startswith("{") and head[0].endswith("}")):
        return False
    return any(not _entry("", line).problem for line in head if line)


def _entry(location: str, line: str) -> Entry:
    try:
        return Entry(location, parse_json(line, nan_is_null=True))
    except BadSample as error:
        return Entry(location, None, str(error))


def read_csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Yield the given columns of each row of a CSV file, which may be gzipped. Empty cells and NaN are "".

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    gzipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            problem = encoding_problem(file.read(HEAD_BYTES))
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
        raise DataError(f"{path} is not UTF-8 ({error.reason}); {CONVERT}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); download it again") from error
