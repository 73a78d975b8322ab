"""The samples that a probe asks, of one shard folder: what the plan names, read from the shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.evaluation.findings import chest_labeler
from medalign.evaluation.generation import GROUPING, digest
from medalign.evaluation.probes.catalog import BLANK, CAPTION, CHANGED, NO, NO_IMAGE, NO_QUESTION, OTHER, SHUFFLED, YES
from medalign.evaluation.probes.knowledge import report_of
from medalign.evaluation.probes.plan import Entry
from medalign.geometry import PatchGrid

GRAY = 128  # of 255
_IMAGES = 32  # bits of a sample's length below its number of images


class ProbeSamples:
    """The questions of a probe in one folder.

    Args:
        name: of the probe.
        entries: of the plan.
        folder: number of the folder.
        indexes: all folders.
        grid: the student's grid, whose patches are shuffled.
    """

    def __init__(
        self, name: str, entries: Sequence[Entry], folder: int, indexes: Sequence[ShardIndex], grid: PatchGrid
    ) -> None:
        self._name = name
        self._entries = entries
        self._index = indexes[folder]
        self._indexes = indexes
        self._grid = grid

    def __len__(self) -> int:
        return len(self._entries)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Relative length of each question, int64: by number of images, then by characters of its sample."""
        if not len(indices):
            return np.zeros(0, dtype=np.int64)
        lengths = self._index.lengths(np.array([self._entries[i][0] for i in indices]))
        if self._name in (NO_IMAGE, CAPTION):
            return lengths & ((1 << _IMAGES) - 1)
        return lengths >> _IMAGES << _IMAGES if self._name == NO_QUESTION else lengths

    def read(self, i: int) -> Sample:
        """Read question i. Raises BadSample if its sample, or the one that is shown with it, cannot be used."""
        sample = self._index.read(self._entries[i][0])
        if self._name not in CHANGED:
            return ask(sample, *self._entries[i][1:])
        source = self._entries[i][1]
        # Boxes belong to the true image.
        return _CHANGES[self._name](self, replace(sample, boxes=()), source)

    def _blank(self, sample: Sample, _source: Any) -> Sample:
        return replace(sample, images=tuple(blank(image) for image in sample.images))

    def _shuffled(self, sample: Sample, _source: Any) -> Sample:
        return replace(sample, images=tuple(shuffle(image, self._grid) for image in sample.images))

    def _other(self, sample: Sample, source: tuple[int, int]) -> Sample:
        return replace(sample, images=self._indexes[source[0]].read(source[1]).images)

    def _no_image(self, sample: Sample, _source: Any) -> Sample:
        return replace(sample, images=())

    def _no_question(self, sample: Sample, _source: Any) -> Sample:
        return replace(sample, question="")

    def _caption(self, sample: Sample, source: tuple[int, int]) -> Sample:
        report = report_of(self._indexes[source[0]].read_fields(source[1]))
        if not report:
            raise BadSample(f"{sample.shard}/{sample.key}: its report is gone; evaluate again")
        return replace(sample, images=(), question=f"{report}\n{sample.question}")


_CHANGES: dict[str, Callable[[ProbeSamples, Sample, Any], Sample]] = {
    BLANK: ProbeSamples._blank,
    SHUFFLED: ProbeSamples._shuffled,
    OTHER: ProbeSamples._other,
    NO_IMAGE: ProbeSamples._no_image,
    NO_QUESTION: ProbeSamples._no_question,
    CAPTION: ProbeSamples._caption,
}


def blank(image: Image.Image) -> Image.Image:
    """Return a gray image of the same size and mode."""
    return Image.new(image.mode, image.size, GRAY if image.mode == "L" else (GRAY,) * len(image.mode))


def shuffle(image: Image.Image, grid: PatchGrid) -> Image.Image:
    """Put the patches of an image in another order, which depends only on the image.

    Args:
        image: the image. What does not fill a whole patch at its right and lower edge stays where it is.
        grid: how many patches there are from top to bottom and from left to right.
    """
    wide, high = max(image.width // grid.columns, 1), max(image.height // grid.rows, 1)
    rows, columns = min(image.height // high, grid.rows), min(image.width // wide, grid.columns)
    corners = [(x * wide, y * high) for y in range(rows) for x in range(columns)]
    order = np.random.default_rng(int(digest([image]), 16)).permutation(len(corners))
    shuffled = image.copy()
    for (x, y), other in zip(corners, order, strict=True):
        left, top = corners[other]
        shuffled.paste(image.crop((left, top, left + wide, top + high)), (x, y))
    return shuffled


def ask(sample: Sample, finding: str, answer: str) -> Sample:
    """Return a question about a finding on the image of a sample.

    Args:
        sample: any sample that shows the image.
        finding: a name of the lexicon.
        answer: the reference: YES or NO for "Is there ...?", otherwise that of a question that presupposes the finding.
    """
    entry = chest_labeler().lexicon.findings[finding]
    closed = answer in (YES, NO)
    kept = {name: sample.metadata[name] for name in GROUPING if name in sample.metadata}
    return replace(
        sample,
        key=f"{sample.key}-{finding.replace(' ', '_')}",
        task="vqa",
        question=f"Is there {entry.noun}?" if closed else entry.asked,
        answer=answer,
        answer_type="closed" if closed else "open",
        boxes=(),
        metadata={**kept, "finding": finding},
    )
