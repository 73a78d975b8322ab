"""Lines without a split to train/, val/ and test/, so that no image, and no patient where asked for, is in two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medalign.data.records import Refused
from medalign.data.samples import BadSample
from medalign.data.sources.image_fields import named_images
from medalign.data.sources.splitting import Groups, canonical_path, share_split, warn_of_empty_splits
from medalign.data.sources.texts import field
from medalign.distributed import log


class Line(NamedTuple):
    """A line of annotations."""

    place: str
    row: dict[str, Any]


def assign_splits(
    lines: Iterable[Line | Refused], folder: Path, group_by: Sequence[str], test_share: float, val_share: float
) -> Iterator[Line | Refused]:
    """The lines in their order, each with a split; it depends on the names in them, not on the order.

    Lines that share an image, or the value of a field of `group_by`, are one group, and so are lines that are connected
    over others. A line that names its split keeps it, and its group follows it. Where a group has lines of several
    splits, its lines without one are refused, for anywhere they would leak.
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
            yield Refused(line.place, str(error))
            continue
        groups.add(members)
        kept.append((line, members[0]))
    given: dict[str, set[str]] = {}
    for line, member in kept:
        if line.row.get("split"):
            given.setdefault(groups.name(member), set()).add(line.row["split"])
    _warn(kept, given)
    names = {groups.name(member) for _, member in kept}
    divided = {name: share_split(name, test_share, val_share) for name in names if name not in given}
    named = {f"{name} in {split}": split for name, splits in given.items() for split in splits}
    warn_of_empty_splits(divided | named if divided else {}, test_share, val_share)
    for line, member in kept:
        group = groups.name(member)
        yield _with_split(line, sorted(given.get(group) or {divided[group]}))


def _with_split(line: Line, splits: list[str]) -> Line | Refused:
    """The line with its own split, or the one of its group."""
    if line.row.get("split"):
        return line
    if len(splits) > 1:
        return Refused(line.place, f"no split is named, and it shares an image or a group with lines of {splits}")
    return Line(line.place, {**line.row, "split": splits[0]})


def _warn(kept: Sequence[tuple[Line, str]], given: dict[str, set[str]]) -> None:
    named = sum(bool(line.row.get("split")) for line, _ in kept)
    if named:
        log.warning("%d of %d lines name their split and keep it; only lines without one are divided", named, len(kept))
    leaks = sum(len(splits) > 1 for splits in given.values())
    if leaks:
        log.warning("%d images or groups are in several splits, because their lines name them", leaks)


def _members(row: dict[str, Any], root: str, group_by: Sequence[str]) -> list[str]:
    """What a line belongs to: its groups and images, or else itself. Raises BadSample for a field without a value."""
    groups = [f"{name}={value}" for name in group_by for value in _values(row, name)]
    images = [canonical_path(root, name) for name in named_images(row) if isinstance(name, str)]
    return groups + images or [str(row["id"])]


def _values(row: dict[str, Any], name: str) -> list[str]:
    """The values of a field, of which a line may have a list."""
    given = row.get(name)
    values = [field({name: one}, name) for one in (given if isinstance(given, list) else [given])]
    if not values or not all(values):
        raise BadSample(f"{name} is empty; --group-by {name} needs it in each line")
    return values
