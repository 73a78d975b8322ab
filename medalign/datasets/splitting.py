"""Assign splits by a hash, for data sets without one. Related samples get the same split in any order of rows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence

from medalign.distributed import log


class Groups:
    """Disjoint groups of related names, for example the images of a sample or the samples of a patient."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._name: dict[str, str] = {}  # of each root: the smallest of its leading names

    def add(self, names: Sequence[str]) -> None:
        """Join these names to one group; the first is a candidate for the name of the group."""
        roots = {self._root(name) for name in names}
        root = min(roots)
        known = [self._name[one] for one in roots if one in self._name]
        for one in roots:
            self._parent[one] = root
        self._name[root] = min([names[0], *known])

    def name(self, member: str) -> str:
        """Return the name of a member's group: the smallest of the first names passed to `add`."""
        return self._name[self._root(member)]

    def _root(self, name: str) -> str:
        path = []
        while (parent := self._parent.setdefault(name, name)) != name:
            path.append(name)
            name = parent
        for one in path:
            self._parent[one] = name
        return name


def canonical_path(root: str, name: str, fallback: str | None = None) -> str:
    """Return the path of a file relative to `root`, the same for all spellings of it ("./a.jpg", a link).

    Args:
        root: a real path.
        name: the path of the file relative to `root`.
        fallback: a folder to search if the file does not exist in `root`, as in `read_pictures`.
    """
    try:
        path = os.path.join(root, name)
        if fallback and not os.path.exists(path):
            path = os.path.join(fallback, name)
        return os.path.relpath(os.path.realpath(path), root)
    except ValueError:  # NUL or half a character in the name; the file cannot be read either
        return name


def split_by_hash(case: str, test_share: float, val_share: float = 0.0) -> str:
    """Return "test" or "val" for these fractions of all cases, and "train" otherwise, depending on the name only."""
    position = unit_hash(case)
    if position < test_share:
        return "test"
    return "val" if position < test_share + val_share else "train"


def warn_of_empty_splits(splits: Mapping[str, str], test_share: float, val_share: float = 0.0) -> None:
    """Log a warning for each split with a fraction above 0 but without any group.

    Args:
        splits: the split of each group, by the name of the group.
        test_share: fraction of the groups in the test split.
        val_share: fraction of the groups in the validation split.
    """
    shares = {"train": round(1 - test_share - val_share, 9), "val": val_share, "test": test_share}
    for name, part in shares.items():
        if splits and part and name not in splits.values():
            log.warning(
                "the split %s is empty: of %d groups (images or cases that stay together), none falls into its "
                "fraction of %g; choose other fractions, or name the splits in the data",
                *(name, len(splits), part),
            )


def unit_hash(name: str) -> float:
    """Map a name to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def parse_fraction(value: str) -> float:
    """Parse a fraction in [0, 1], for settings. Raises ValueError if it is not one."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return number
