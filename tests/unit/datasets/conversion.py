"""Helpers for tests of converters: run one, open its output, write the small files of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medalign.contracts import Sample
from medalign.data.shards.index import ShardIndex
from medalign.datasets import get_converter
from medalign.datasets.convert import convert
from medalign.datasets.report import ConversionReport
from tests.unit.data.tiny_data import picture


def pack(name: str, folder: Path, output: Path, **chosen: Any) -> ConversionReport:
    """Convert with one process and the settings `chosen`."""
    return convert(get_converter(name), folder, output, chosen=chosen, workers=1)


def samples(folder: Path) -> list[Sample]:
    """All samples of a shard folder, in order."""
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
