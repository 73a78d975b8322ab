"""The parts of a conversion: each is one shard's listed samples, which one process converts.

A part is finished when its account, a JSON file beside its shard folder, is on disk.
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
from medalign.data.shards.records import Record, Refused
from medalign.data.shards.writer import PackReport, join_shards, write_shards
from medalign.datasets import find
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
    def account(self) -> Path:
        """The file whose presence says that the part is finished."""
        return self.shards.with_suffix(".json")


def convert_part(part: Part, progress: Callable[[int], object]) -> None:
    """Write a part's shard and then its account; `progress` is called with 1 for each item."""
    shutil.rmtree(part.shards, ignore_errors=True)
    report = write_shards(
        _records(part, progress), part.shards, samples_per_shard=max(1, len(part.items)), allow_empty=True
    )
    refused = [line.partition(": ") for line in report.refused]
    skipped = generalize([Skipped(key, reason) for key, _, reason in refused], part.hashing)
    text = json.dumps({"skipped": [[one.key, one.reason] for one in skipped], "notes": dict(report.notes)})
    partial = part.account.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(part.account)


def _records(part: Part, progress: Callable[[int], object]) -> Iterator[Record | Refused]:
    source = find(part.source)
    for item in part.items:
        try:
            record = source.build_record(part.input, item, part.chosen)
            yield part.hashing.record(record) if part.hashing else record
        except BadSample as error:
            yield Refused(part.hashing.name(item.key) if part.hashing else item.key, str(error))
        progress(1)


def join_parts(parts: Sequence[Part], output: Path, marker: Path) -> tuple[PackReport, list[Skipped]]:
    """The split's shards in their place; `marker` remembers it, should the command stop before the last split."""
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    for part in parts:
        account = json.loads(part.account.read_text(encoding="utf-8"))
        skipped += [Skipped(*pair) for pair in account["skipped"]]
        notes.update(account["notes"])
    usable = sum(len(part.items) for part in parts) > len(skipped)
    if not usable:
        return PackReport(0, 0, ()), skipped
    if not marker.exists():
        report = join_shards([part.shards for part in parts], output)
        marker.write_text(json.dumps([report.written, report.shards]), encoding="utf-8")
    written, shards = json.loads(marker.read_text(encoding="utf-8"))
    return PackReport(written, shards, (), notes), skipped


def generalize(skipped: Sequence[Skipped], hashing: Hashing | None) -> list[Skipped]:
    """Where names are hashed, a reason must not tell them either: its kind is kept, its particulars are not."""
    return [Skipped(one.key, kind(one.reason) if hashing else one.reason) for one in skipped]
