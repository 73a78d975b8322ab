"""A converter of another package, given by its import path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medalign.cli.main import main
from tests.unit.datasets.conversion import samples, write_picture

MODULE = """
from medalign.data.shards.records import Record
from medalign.datasets.base import DatasetConverter, Item, Setting
from medalign.datasets.files import read_picture


def validate_layout(folder, settings):
    return []


def iter_items(folder, settings):
    for path in sorted(folder.glob("*.png")):
        yield Item(settings["into"], path.stem, {"image": path.name})


def build_record(folder, item, settings):
    fields = {"task": "report", "report": item.key, "answer_type": ""}
    return Record(item.key, (read_picture(folder, item.data["image"]),), fields)


INTO = Setting("into", "the split of all images", "train")
CONVERTER = DatasetConverter("own", "my images", "*.png", validate_layout, iter_items, build_record, (INTO,))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported as own_converters."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "own_converters.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "package")
    return tmp_path


def test_it_has_its_options_and_runs_in_several_processes(module: Path) -> None:
    for name in "abc":
        write_picture(module / "in" / f"{name}.png", 1)
    options = ["--into", "val", "--workers", "2", "--samples-per-shard", "2"]
    words = ["own_converters:CONVERTER", "--input", str(module / "in"), "--output", str(module / "out"), *options]
    assert main(["shards", *words]) == 0
    assert [sample.answer for sample in samples(module / "out" / "val")] == ["a", "b", "c"]
    report = json.loads((module / "out" / "conversion.json").read_text())
    assert (report["source"], report["settings"]) == ("own_converters:CONVERTER", {"into": "val"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent_package:CONVERTER", "cannot be imported: No module named 'absent_package'"),
        ("own_converters:OTHER", "cannot be imported: module 'own_converters' has no attribute 'OTHER'"),
        ("own_converters:INTO", "is a Setting; give a medalign.datasets.base.DatasetConverter"),
        ("own_converters:", "is not an import path such as package.module:name"),
    ],
)
def test_a_path_without_a_converter_is_refused(
    module: Path, path: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["shards", path, "--help"]) == 2
    assert f"error: the converter '{path}' {message}" in caplog.text
