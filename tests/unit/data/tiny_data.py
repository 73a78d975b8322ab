"""Small real images and records."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.loader import join_usable
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.evaluation.batching import read_or_reason


def picture(seed: int, width: int = 40, height: int = 24, kind: str = "png") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG" if kind == "png" else "JPEG")
    return buffer.getvalue()


def images(*encoded: bytes) -> tuple[Picture, ...]:
    """Images of a record, each with the format of its content."""
    return tuple(Picture(data, "png" if data.startswith(b"\x89PNG") else "jpg") for data in encoded)


def record(i: int, **changes: object) -> Record:
    fields = {
        "id": f"s{i:03d}",
        "task": "vqa",
        "question": f"is there a nodule in zone {i % 7} ?",
        "answer": "yes" if i % 2 else "no",
        "answer_type": "closed",
        "boxes": [[1.0, 2.0, 9.5, 12.0]],
        "split": "train",
        "case": f"c{i}",
    }
    return Record(f"s{i:03d}", images(picture(i)), {**fields, **changes})


def batches(
    index: ShardIndex, collator: Collator, size: int, indices: Sequence[int] | None = None
) -> Iterator[tuple[list[Sample], Batch]]:
    """Yield the usable samples of each group of `size` samples, in order, with their batch."""
    selected = list(range(len(index)) if indices is None else indices)
    for start in range(0, len(selected), size):
        found = [read_or_reason(index, i) for i in selected[start : start + size]]
        places, batch, reasons = join_usable(collator, found)
        if batch is not None:
            yield (
                [sample for place in places if isinstance(sample := found[place], Sample)],
                replace(batch, skipped=reasons),
            )
