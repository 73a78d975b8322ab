"""Interface of a converter: it lists the samples of a data set's folder, and builds a record from a listed sample.

Listing is cheap (it only reads annotations) and has a fixed order; building a record reads the image. The listing can
therefore be cut into parts that are converted by several processes, and finished parts need not be converted again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused

Settings = Mapping[str, Any]  # settings of a converter by name, with underscores instead of hyphens

# Fields that identify a person or an image; they are hashed on request. All converters use these names.
IDENTIFIERS = frozenset({"id", "case", "patient", "study", "image", "images", "mask", "qid"})

_SPLIT = re.compile(r"\w[\w-]*")
_MAX_SPLIT_BYTES = 200  # file systems allow names of 255 bytes, and temporary folders have longer names


@dataclass(frozen=True)
class Setting:
    """An option of one converter, `--name` on the command line."""

    name: str  # with hyphens
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    several: bool = False  # takes one or more values
    parse: Callable[[str], Any] = str


@dataclass(frozen=True)
class Item:
    """One listed sample. Raises BadSample if the split is not a valid folder name."""

    split: str
    key: str  # unique in the data set
    data: dict[str, Any]  # JSON values: all that `build_record` needs in addition to the folder

    def __post_init__(self) -> None:
        # A dot could make the folder of a split hidden, or equal to a temporary folder of the conversion.
        if not _SPLIT.fullmatch(self.split) or len(self.split.encode()) > _MAX_SPLIT_BYTES:
            raise BadSample(
                f"split is {self.split!r}; it names a folder, for example 'train': use only letters, digits, '_' and "
                f"'-', at most {_MAX_SPLIT_BYTES} bytes"
            )


@dataclass(frozen=True)
class DatasetConverter:
    """A data set that can be converted."""

    name: str  # on the command line
    title: str
    layout: str  # help text: the required files, where to get them, and what is written
    validate_layout: Callable[[Path, Settings], list[str]]  # one line per missing file or folder; empty if complete
    iter_items: Callable[[Path, Settings], Iterator[Item | Refused]]
    build_record: Callable[[Path, Item, Settings], Record]  # raises BadSample
    settings: tuple[Setting, ...] = ()
    public_name: str = ""  # name under which the data set can be found

    def defaults(self) -> dict[str, Any]:
        """Return the default of each setting."""
        return {setting.name.replace("-", "_"): setting.default for setting in self.settings}
