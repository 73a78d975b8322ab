"""Small real shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.data.shards.records import Record
from medalign.data.shards.writer import write_shards
from tests.unit.data.tiny_data import record


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """23 samples in 4 shards; every fifth is a sample without image."""
    records = [record(i) for i in range(23)]
    for i in range(0, 23, 5):
        records[i] = Record(records[i].key, (), {**records[i].fields, "boxes": []})
    write_shards(records, tmp_path / "train", samples_per_shard=7)
    return tmp_path / "train"
