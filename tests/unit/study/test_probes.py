"""The test questions on other films."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medalign import phantom
from medalign.data.shards.index import ShardIndex
from medalign.evaluation.probes.samples import GRAY
from tools.study.probes import write_probes


def test_questions_stay_and_films_change(tmp_path: Path) -> None:
    phantom.write_phantoms(tmp_path / "films", 1, 4, 0, reports=1.0)
    write_probes(tmp_path / "films" / "val", tmp_path / "probes")
    before = (tmp_path / "probes" / "other" / "index.jsonl").stat().st_mtime_ns
    write_probes(tmp_path / "films" / "val", tmp_path / "probes")
    assert (tmp_path / "probes" / "other" / "index.jsonl").stat().st_mtime_ns == before
    asked = {sample.key: sample for sample in _samples(tmp_path / "films" / "val") if sample.task == "vqa"}
    pixels = {key: np.asarray(sample.images[0]) for key, sample in asked.items()}
    for probe in ("blank", "other"):
        found = {sample.key: sample for sample in _samples(tmp_path / "probes" / probe)}
        assert found.keys() == asked.keys()
        for key, sample in found.items():
            true = asked[key]
            assert (sample.question, sample.answer, sample.answer_type) == (
                true.question,
                true.answer,
                true.answer_type,
            )
            assert sample.boxes == ()
            shown = np.asarray(sample.images[0])
            if probe == "blank":
                assert shown.shape == pixels[key].shape and (shown == GRAY).all()
            else:
                owners = {other.rpartition("-")[0] for other in pixels if np.array_equal(pixels[other], shown)}
                assert len(owners) == 1 and owners != {key.rpartition("-")[0]}
    films = {sample.images[0].tobytes() for sample in _samples(tmp_path / "probes" / "other")}
    assert len(films) == 4  # each study's film is used


def _samples(folder: Path):
    index = ShardIndex.open(folder)
    return [index.read(place) for place in range(len(index))]
