"""Assign lines without a split to train/, val/ and test/ so that no image, or group on request, is in two splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Refused
from medalign.datasets.image_fields import named_images
from medalign.datasets.splitting import Groups, canonical_path, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import field
from medalign.distributed import log


class Line(NamedTuple):
    """A line of annotations."""

    location: str  # file and line number
    row: dict[str, Any]


def assign_splits(
    lines: Iterable[Line | Refused], folder: Path, group_by: Sequence[str], test_share: float, val_share: float
) -> Iterator[Line | Refused]:
    """Yield the lines in order, each with a split that depends on its names only, not on the order of lines.

    Lines that share an image, or the value of a field of `group_by`, form a group, directly or through other lines. A
    line with a split keeps it, and the other lines of its group get the same split. If a group has lines of several
    splits, its lines without one are refused, because they would leak into another split.

    Args:
        lines: the annotations.
        folder: the folder of the data set.
        group_by: names of fields.
        test_share: fraction of the groups in the test split.
        val_share: fraction of the groups in the validation split.
    """
    groups, root = Groups(), os.path.realpath(folder)
    kept: list[tuple[Line, str]] = []
    for line in lines:
        if isinstance(line, Refused):
            yield line
            continue
        try:
            members = _members(line.row, root, group_by)
        except BadSample as error:
            yield Refused(line.location, str(error))
            continue
        groups.add(members)
        kept.append((line, members[0]))
    given: dict[str, set[str]] = {}
    for line, member in kept:
        if line.row.get("split"):
            given.setdefault(groups.name(member), set()).add(line.row["split"])
    _warn(kept, given)
    names = {groups.name(member) for _, member in kept}
    divided = {name: split_by_hash(name, test_share, val_share) for name in names if name not in given}
    named = {f"{name} in {split}": split for name, splits in given.items() for split in splits}
    warn_of_empty_splits(divided | named if divided else {}, test_share, val_share)
    for line, member in kept:
        group = groups.name(member)
        yield _with_split(line, sorted(given.get(group) or {divided[group]}))


def _with_split(line: Line, splits: list[str]) -> Line | Refused:
    """Return the line with its own split, or that of its group."""
    if line.row.get("split"):
        return line
    if len(splits) > 1:
        return Refused(line.location, f"it has no split, and it shares an image or a group with lines of {splits}")
    return Line(line.location, {**line.row, "split": splits[0]})


def _warn(kept: Sequence[tuple[Line, str]], given: dict[str, set[str]]) -> None:
    named = sum(bool(line.row.get("split")) for line, _ in kept)
    if named:
        log.warning("%d of %d lines have a split and keep it; only the other lines are assigned", named, len(kept))
    leaks = sum(len(splits) > 1 for splits in given.values())
    if leaks:
        log.warning("%d images or groups are in several splits, because their lines say so", leaks)


def _members(row: dict[str, Any], root: str, group_by: Sequence[str]) -> list[str]:
    """Names of the groups and images of a line, or its id. Raises BadSample if a field has no value."""
    groups = [f"{name}={value}" for name in group_by for value in _values(row, name)]
    images = [canonical_path(root, name) for name in named_images(row) if isinstance(name, str)]
    return groups + images or [str(row["id"])]


def _values(row: dict[str, Any], name: str) -> list[str]:
    """The values of a field, which may be a list."""
    given = row.get(name)
    values = [field({name: one}, name) for one in (given if isinstance(given, list) else [given])]
    if not values or not all(values):
        raise BadSample(f"{name} is empty; --group-by {name} requires a value in each line")
    return values
