"""Which samples are answered together: the same batches for any number of ranks, and after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample


class Samples(Protocol):
    """Samples that can be read by their index, such as a folder of shards."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample:
        """Read a sample. Raises BadSample if it cannot be used."""
        ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Relative length of each sample, int64."""
        ...


class Place(NamedTuple):
    """Where a sample is: number of its folder, and its number there. Places sort in the order of the predictions."""

    folder: int
    sample: int


def plan_batches(folders: Sequence[Samples], planned: Sequence[int], batch_size: int) -> list[list[Place]]:
    """Group the first samples of each folder into batches of similar length, which need little padding.

    The longest come first: a batch that does not fit into memory fails at the start, and the last batches are short, so
    the ranks end at about the same time.

    Args:
        folders: the samples.
        planned: how many samples of each folder.
        batch_size: samples per batch; the last one may have fewer.
    """
    places = [Place(folder, i) for folder, count in enumerate(planned) for i in range(count)]
    parts = [folder.lengths(np.arange(count)) for folder, count in zip(folders, planned, strict=True)]
    order = np.argsort(-np.concatenate(parts), kind="stable")
    return [[places[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]


def describe_batches(batches: Sequence[Sequence[Place]]) -> str:
    """Return 64 bits of the SHA-256 of which samples are in which batch, in hexadecimal."""
    return hashlib.sha256(repr([[tuple(place) for place in batch] for batch in batches]).encode()).hexdigest()[:16]


def read_or_reason(samples: Samples, i: int) -> Sample | BadSample:
    """Return sample i, or why it cannot be used."""
    try:
        return samples.read(i)
    except BadSample as error:
        return error
