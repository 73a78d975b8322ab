"""Splits by a hash, for data sets without one: what belongs together falls on one side, whatever the order of rows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence

from medalign.distributed import log


class Groups:
    """Names that belong together, directly or over others: the images of a sample, the samples of a patient."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._name: dict[str, str] = {}  # of each root: the smallest of its leading names

    def add(self, names: Sequence[str]) -> None:
        """Join these; the first is the leading one, by which the group may be called."""
        roots = {self._root(name) for name in names}
        root = min(roots)
        known = [self._name[one] for one in roots if one in self._name]
        for one in roots:
            self._parent[one] = root
        self._name[root] = min([names[0], *known])

    def name(self, member: str) -> str:
        """The group's name: the smallest of the leading names that were added to it."""
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
    """A file's path relative to `root`, a real path, however `name` writes it: "./a.jpg", or a link to it.

    A file that is not there is looked for below `fallback`, as `read_pictures` does.
    """
    try:
        path = os.path.join(root, name)
        if fallback and not os.path.exists(path):
            path = os.path.join(fallback, name)
        return os.path.relpath(os.path.realpath(path), root)
    except ValueError:  # a NUL or half a character in the name; the file cannot be read either
        return name


def share_split(case: str, test_share: float, val_share: float = 0.0) -> str:
    """ "test" or "val" for these shares of all cases, else "train"; it depends on the case's name alone."""
    place = unit_hash(case)
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def warn_of_empty_splits(splits: Mapping[str, str], test_share: float, val_share: float = 0.0) -> None:
    """A warning for each split that has a share but no group.

    Args:
        splits: of each group that was divided, by its name.
    """
    shares = {"train": round(1 - test_share - val_share, 9), "val": val_share, "test": test_share}
    for name, part in shares.items():
        if splits and part and name not in splits.values():
            log.warning(
                "the split %s is empty: of %d groups (images or cases that stay together) none falls into its share of "
                "%g; choose other shares, or name the splits yourself",
                *(name, len(splits), part),
            )


def unit_hash(name: str) -> float:
    """A number in [0, 1) that belongs to the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def share(value: str) -> float:
    """A share in [0, 1], for settings. Raises ValueError that says so."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return number
