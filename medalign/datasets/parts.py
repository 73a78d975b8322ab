"""Parts of a conversion: the listed samples of one shard, converted by one process.

A part is finished when its report, a JSON file next to its shard folder, is on disk.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.joining import join_shards
from medalign.data.shards.records import Record, Refused
from medalign.data.shards.writer import PackReport, write_shards
from medalign.datasets import get_converter
from medalign.datasets.base import Item
from medalign.datasets.hashing import Hashing
from medalign.datasets.report import Skipped, kind


@dataclass(frozen=True)
class Part:
    """The listed samples of one shard, and all that a process needs to convert them."""

    source: str
    input: Path
    chosen: dict[str, Any]
    hashing: Hashing | None
    split: str
    items: tuple[Item, ...]
    shards: Path  # folder to write

    @property
    def report(self) -> Path:
        """The file that marks the part as finished."""
        return self.shards.with_suffix(".json")


def convert_part(part: Part, progress: Callable[[int], object]) -> None:
    """Write the shard of a part and then its report; `progress` is called with 1 per item."""
    shutil.rmtree(part.shards, ignore_errors=True)
    packed = write_shards(
        _records(part, progress), part.shards, samples_per_shard=max(1, len(part.items)), allow_empty=True
    )
    refused = [line.partition(": ") for line in packed.refused]
    skipped = generalize([Skipped(key, reason) for key, _, reason in refused], part.hashing)
    text = json.dumps({"skipped": [[one.key, one.reason] for one in skipped], "notes": dict(packed.notes)})
    partial = part.report.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(part.report)


def _records(part: Part, progress: Callable[[int], object]) -> Iterator[Record | Refused]:
    source = get_converter(part.source)
    for item in part.items:
        try:
            record = source.build_record(part.input, item, part.chosen)
            yield part.hashing.record(record) if part.hashing else record
        except BadSample as error:
            yield Refused(part.hashing.name(item.key) if part.hashing else item.key, str(error))
        progress(1)


def join_parts(parts: Sequence[Part], output: Path, marker: Path) -> tuple[PackReport, list[Skipped]]:
    """Join the shards of a split.

    Args:
        parts: the finished parts of the split.
        output: the folder of the split.
        marker: a file that records the joined split, for the case that the command stops before the last split.

    Returns:
        What was written, and what was skipped.
    """
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    for part in parts:
        report = json.loads(part.report.read_text(encoding="utf-8"))
        skipped += [Skipped(*pair) for pair in report["skipped"]]
        notes.update(report["notes"])
    usable = sum(len(part.items) for part in parts) > len(skipped)
    if not usable:
        return PackReport(0, 0, ()), skipped
    if not marker.exists():
        packed = join_shards([part.shards for part in parts], output)
        marker.write_text(json.dumps([packed.written, packed.shards]), encoding="utf-8")
    written, shards = json.loads(marker.read_text(encoding="utf-8"))
    return PackReport(written, shards, (), notes), skipped


def generalize(skipped: Sequence[Skipped], hashing: Hashing | None) -> list[Skipped]:
    """If names are hashed, reduce each reason to its general form, which contains no names."""
    return [Skipped(one.key, kind(one.reason) if hashing else one.reason) for one in skipped]
