"""The fingerprint of a folder does not depend on its location, but on samples, packing and order."""

from __future__ import annotations

import shutil

from medalign.data.shards import table, table_reader
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import build_index, write_shards
from tests.unit.data.tiny_data import record


def fingerprint(*folders):
    return ShardIndex.open(list(folders)).fingerprint()


def packed(folder, count=23, size=7, **changes):
    write_shards([record(i, **(changes if i == 3 else {})) for i in range(count)], folder, samples_per_shard=size)
    return folder


def test_it_survives_moving_the_folder_and_rebuilding_the_index(tmp_path):
    folder = packed(tmp_path / "a")
    before = fingerprint(folder)
    assert before[0].startswith("23 samples in 4 shards of ")
    moved = shutil.move(folder, tmp_path / "b")
    assert fingerprint(moved) == before
    (tmp_path / "b" / "index.jsonl").unlink()
    build_index(tmp_path / "b")
    assert fingerprint(moved) == before


def test_different_data_have_different_fingerprints(tmp_path):
    base = packed(tmp_path / "base")
    others = {
        "fewer": packed(tmp_path / "fewer", count=22),
        "repacked": packed(tmp_path / "repacked", size=8),
        "answer": packed(tmp_path / "answer", answer="no", answer_type="closed"),
    }
    found = {name: fingerprint(folder) for name, folder in others.items()} | {"base": fingerprint(base)}
    assert len(set(found.values())) == len(found)
    assert fingerprint(base, others["fewer"]) != fingerprint(others["fewer"], base)


def test_a_mapped_index_has_the_same_fingerprint(tmp_path, monkeypatch):
    folder = packed(tmp_path / "a")
    before = fingerprint(folder)
    monkeypatch.setattr(table_reader, "LARGE", 5)
    monkeypatch.setattr(table, "_CHUNK", 5)  # many pieces instead of one
    assert fingerprint(folder) == before and (folder / "index.bin").is_file()
