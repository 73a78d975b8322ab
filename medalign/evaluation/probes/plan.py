"""What a probe asks, as JSON values, so that all ranks ask the same.

For a probe in `CHANGED`, an entry is [sample, source]: a sample of the folder, and the place of the sample whose image
or report is shown with it, or None. For one in `ASKED`, an entry is [sample, finding, answer]: the first sample that
shows an image, and the question about it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from medalign.data.shards.index import ShardIndex
from medalign.evaluation.batching import Place
from medalign.evaluation.findings import chest_labeler
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.probes.catalog import (
    ADVERSARIAL,
    ASKED,
    CAPTION,
    CHANGED,
    HERE,
    NO,
    NOWHERE,
    OTHER,
    POPULAR,
    PRESUPPOSED,
    YES,
)
from medalign.evaluation.probes.knowledge import Evidence, Known, known_findings, report_of

PAIRS = 3  # POPE asks about as many present findings per image, and as many absent ones

Entry = list[Any]


@dataclass(frozen=True)
class Plan:
    """What one probe asks.

    Attributes:
        folders: the entries of each shard folder.
        not_asked: why samples or images are left out, with their number.
    """

    folders: list[list[Entry]]
    not_asked: dict[str, int]

    @property
    def asked(self) -> int:
        """Number of questions."""
        return sum(map(len, self.folders))

    @property
    def digest(self) -> str:
        """64 bits of the SHA-256 of the entries, in hexadecimal."""
        return hashlib.sha256(repr(self.folders).encode()).hexdigest()[:16]


class Planner:
    """Plans probes from the answers of an evaluation.

    Args:
        indexes: the shard folders.
        planned: how many samples of each folder were evaluated.
        rows: the answers.
    """

    def __init__(self, indexes: Sequence[ShardIndex], planned: Sequence[int], rows: Sequence[Prediction]) -> None:
        self._indexes = indexes
        places = [{index.key(i): i for i in range(count)} for index, count in zip(indexes, planned, strict=True)]
        self._rows = [(Place(row.folder, places[row.folder][row.key]), row) for row in rows]
        self._first: dict[str, Place] = {}  # image -> the first sample that shows it
        for place, row in self._rows:
            if row.image:
                self._first.setdefault(row.image, place)
        self._evidence: dict[str, Evidence] = {}
        self._report: dict[str, Place] = {}  # image -> the first sample with its report

    def plan(self, name: str) -> Plan:
        """Plan a probe."""
        if name in ASKED or name == CAPTION:
            self._read_fields()
        entries, reasons = self._changed(name) if name in CHANGED else self._asked(name)
        folders: list[list[Entry]] = [[] for _ in self._indexes]
        for folder, *entry in entries:
            folders[folder].append(entry)
        return Plan(folders, dict(sorted(reasons.items())))

    def _changed(self, name: str) -> tuple[list[Entry], Counter[str]]:
        sources = self._others() if name == OTHER else self._report if name == CAPTION else self._first
        without = "questions whose image has no report" if name == CAPTION else "questions without another patient"
        entries: list[Entry] = []
        reasons: Counter[str] = Counter()
        for place, row in self._rows:
            if row.task != "vqa":
                reasons["requests for reports"] += 1
            elif not row.image:
                reasons["questions without an image"] += 1
            elif row.image not in sources:
                reasons[without] += 1
            else:
                source = list(sources[row.image]) if name in (OTHER, CAPTION) else None
                entries.append([place.folder, place.sample, source])
        return entries, reasons

    def _others(self) -> dict[str, Place]:
        """Return the next image of another patient for each image, in the order of the data; the last begins again."""
        patients = {row.image: row.patient or f"image {row.image}" for _, row in self._rows if row.image}
        images = list(self._first)
        following: dict[str, str] = {}
        for image, after in reversed(list(zip([*images, *images], [*images[1:], *images, *images[:1]], strict=True))):
            if patients[image] != patients[after]:
                following[image] = after
            elif after in following:
                following[image] = following[after]
        return {image: self._first[other] for image, other in following.items()}

    def _asked(self, name: str) -> tuple[list[Entry], Counter[str]]:
        images = list(self._evidence)
        known = known_findings(self._evidence.values(), chest_labeler())
        reasons: Counter[str] = Counter()
        reasons["samples without an image"] = sum(not row.image for _, row in self._rows)
        reasons["images without a finding that is known to be present"] = sum(not one.present for one in known)
        reasons["images without a finding that is known to be absent"] = sum(not one.absent for one in known)
        choose = _presupposed if name == PRESUPPOSED else _Pope(name, known)
        entries = [
            [*self._first[image], finding, answer]
            for image, one in zip(images, known, strict=True)
            for finding, answer in choose(one, image)
        ]
        return sorted(entries, key=lambda entry: entry[:2]), +reasons

    def _read_fields(self) -> None:
        """Read what the samples say about their images, once."""
        if self._evidence:
            return
        labeler = chest_labeler()
        for place, row in self._rows:
            if row.image:
                fields = self._indexes[place.folder].read_fields(place.sample)
                self._evidence.setdefault(row.image, Evidence()).add(fields, labeler)
                if report_of(fields):
                    self._report.setdefault(row.image, place)


def _presupposed(known: Known, image: str) -> list[tuple[str, str]]:
    """Choose an absent and a present finding of an image, as far as it has them."""
    draw = _generator(image)
    groups = ((known.absent, NOWHERE), (known.present, HERE))
    return [(names[int(draw.integers(len(names)))], answer) for names, answer in groups if names]


class _Pope:
    """Chooses the findings of POPE's questions (Li et al. 2023, arXiv:2305.10355) for the probe `name`."""

    def __init__(self, name: str, known: Sequence[Known]) -> None:
        self.name = name
        self._frequency = Counter(finding for one in known for finding in one.present)
        self._together = Counter(pair for one in known for pair in combinations(sorted(one.present), 2))

    def __call__(self, known: Known, image: str) -> list[tuple[str, str]]:
        pairs = min(len(known.present), len(known.absent), PAIRS)
        draw = _generator(image)
        present = sorted(draw.permutation(len(known.present))[:pairs])
        absent = [known.absent[i] for i in draw.permutation(len(known.absent))]  # ties are in random order
        absent = sorted(absent, key=lambda finding: -self._rank(finding, known.present))[:pairs]
        return [(known.present[i], YES) for i in present] + [(finding, NO) for finding in absent]

    def _rank(self, finding: str, present: Sequence[str]) -> int:
        if self.name == POPULAR:
            return self._frequency[finding]
        if self.name == ADVERSARIAL:
            return sum(self._together[min(finding, one), max(finding, one)] for one in present)
        return 0


def _generator(image: str) -> np.random.Generator:
    """Random numbers that depend only on the image."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big"))


def plan_of(values: Mapping[str, Any]) -> Plan:
    """Return the plan that JSON values describe."""
    return Plan(values["folders"], values["not_asked"])
