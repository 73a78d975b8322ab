"""What the converters' tests share: run one, open what it wrote, write the small files of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_data import picture

from medalign.contracts import Sample
from medalign.data.shards.index import ShardIndex
from medalign.datasets import find
from medalign.datasets.convert import convert
from medalign.datasets.report import ConversionReport


def pack(name: str, folder: Path, output: Path, **chosen: Any) -> ConversionReport:
    """Convert with one process, with the source's settings in `chosen`."""
    return convert(find(name), folder, output, chosen=chosen, workers=1)


def samples(folder: Path) -> list[Sample]:
    """Every sample of a shard folder, in its order."""
    index = ShardIndex.open(folder)
    return [index.read(i) for i in range(len(index))]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_picture(path: Path, seed: int, width: int = 40, height: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, width, height, "png" if path.suffix == ".png" else "jpg"))


def skipped(account: ConversionReport) -> dict[str, str]:
    """Reason of each skipped sample."""
    return {one.key: one.reason for one in account.skipped}
