"""What a converter is: a listing of a data set's folder, and the making of one record from one entry of the listing.

The listing is cheap (annotations alone) and in a fixed order; making a record reads the picture. So the listing can be
cut into parts that processes convert on their own, and a part that is done need not be done again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused

Chosen = Mapping[str, Any]  # the source's settings by name, underscores for hyphens

# Fields that tell who or where: these are hashed on request. Converters name their fields so.
IDENTIFIERS = frozenset({"id", "case", "patient", "study", "image", "images", "mask", "qid"})

_SPLIT = re.compile(r"\w[\w-]*")
_LONGEST_SPLIT = 200  # bytes; file systems hold names of 255, and the hidden neighbors' are longer


@dataclass(frozen=True)
class Setting:
    """An option of one source, on the command line `--name`."""

    name: str  # with hyphens
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    several: bool = False  # takes one or more values
    parse: Callable[[str], Any] = str


@dataclass(frozen=True)
class Item:
    """One sample to be, as the listing knows it. Raises BadSample for a split that names no folder."""

    split: str
    key: str  # unique in the data set
    data: dict[str, Any]  # JSON values: all that `record` needs beside the folder

    def __post_init__(self) -> None:
        # Points would let a split's folder meet the conversion's own files, or hide it.
        if not _SPLIT.fullmatch(self.split) or len(self.split.encode()) > _LONGEST_SPLIT:
            raise BadSample(
                f"split is {self.split!r}; it names a folder, such as 'train': letters, digits, '_' and '-' alone, at "
                f"most {_LONGEST_SPLIT} bytes"
            )


@dataclass(frozen=True)
class DatasetConverter:
    """A data set that can be packed."""

    name: str  # on the command line
    title: str
    layout: str  # what the folder must hold, where to get it, what becomes of it: the command's help
    validate_layout: Callable[[Path, Chosen], list[str]]  # one line a missing piece; empty for a whole folder
    iter_items: Callable[[Path, Chosen], Iterator[Item | Refused]]
    build_record: Callable[[Path, Item, Chosen], Record]  # raises BadSample
    settings: tuple[Setting, ...] = ()
    public_name: str = ""  # what to search for, to get the data set

    def defaults(self) -> dict[str, Any]:
        return {setting.name.replace("-", "_"): setting.default for setting in self.settings}
