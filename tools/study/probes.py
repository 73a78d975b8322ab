"""The questions of the test set on another film: whether a student looks at the film that it is asked about.

- blank: a gray film of the same size.
- other: the film of the next study of the test set, so each study's film is used once.

A student that looks falls to what the questions alone give.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import write_shards
from medalign.evaluation.probes.samples import blank

PROBES = ("blank", "other")


def write_probes(source: Path, output: Path) -> None:
    """Write the shards of each probe to `output`/PROBE, unless they are there.

    Args:
        source: the shards of the test set, whose keys end in the part of their study.
        output: the folder.
    """
    index = ShardIndex.open(source)
    asked = [place for place in range(len(index)) if index.task(place) == "vqa"]
    films = {study_of(index.key(place)): index.read(place).images[0] for place in asked}
    following = dict(zip(films, [*list(films)[1:], next(iter(films))], strict=True))
    shown: dict[str, Callable[[str], Image.Image]] = {
        "blank": lambda study: blank(films[study]),
        "other": lambda study: films[following[study]],
    }
    for probe in PROBES:
        if not (output / probe / "index.jsonl").is_file():
            write_shards(_records(index, asked, shown[probe]), output / probe)


def study_of(key: str) -> str:
    """Return the study of a sample's key."""
    return key.rpartition("-")[0]


def _records(index: ShardIndex, places: list[int], film: Callable[[str], Image.Image]) -> Iterator[Record]:
    """Yield the questions without their boxes, which belong to the true film."""
    for place in places:
        sample = index.read(place)
        names = ("task", "question", "answer", "answer_type")
        fields = {name: getattr(sample, name) for name in names}
        yield Record(sample.key, (Picture(_png(film(study_of(sample.key))), "png"),), fields)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
