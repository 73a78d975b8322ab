"""Phantom studies as shard records: one for the report and one per question."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import PackReport, write_shards
from medalign.phantom.contracts import Box, Study
from medalign.phantom.studies import stream, study

REQUESTS = (
    "Write a report of this chest radiograph.",
    "Describe the findings.",
    "What does this chest film show?",
    "Give a radiology report.",
)


def records(count: int, seed: int, split: str, reports: float = 1.0) -> Iterator[Record]:
    """Yield the records of the first `count` studies of a split, study by study.

    Args:
        count: number of studies.
        seed: seed of the data set.
        split: a name in `SPLITS`.
        reports: fraction of the studies whose report is included.
    """
    for index in range(count):
        case = f"phantom-{split}-{seed}-{index:06d}"
        reported = int((index + 1) * reports) > int(index * reports)
        yield from _study_records(study(stream(seed, split), index), case, index, split, reported)


def write_phantoms(output: Path, train: int, val: int, seed: int, reports: float = 1.0) -> dict[str, PackReport]:
    """Write shards of `train` studies to `output`/train and of `val` studies to `output`/val.

    Args:
        output: the folder.
        train: number of studies for training.
        val: number of studies for validation.
        seed: seed of the data set.
        reports: fraction of the studies whose report is included.

    Returns:
        The packing report of each split.
    """
    counts = {"train": train, "val": val}
    return {
        split: write_shards(records(count, seed, split, reports), output / split) for split, count in counts.items()
    }


def _study_records(item: Study, case: str, index: int, split: str, reported: bool) -> Iterator[Record]:
    film = Picture(_png(item.image), "png")
    shared = {
        "report": item.report,
        "split": split,
        "case": case,
        "findings": [
            {"kind": found.kind, "side": found.side, "zone": found.zone, "size": found.size, "box": list(found.box)}
            for found in item.findings
        ],
    }
    request = REQUESTS[index % len(REQUESTS)]
    every_box = tuple(found.box for found in item.findings)
    entries = [("report", "report", request, item.report, "", every_box)] if reported else []
    for position, asked in enumerate(item.questions):
        entries.append((f"q{position}", "vqa", asked.question, asked.answer, asked.answer_type, asked.boxes))
    for suffix, task, question, answer, answer_type, boxes in entries:
        key = f"{case}-{suffix}"
        fields: dict[str, Any] = {
            "id": key,
            "task": task,
            "question": question,
            "answer": answer,
            "answer_type": answer_type,
            "boxes": [list(box) for box in boxes],
            **shared,
        }
        yield Record(key=key, images=(film,), fields=fields, mask=_mask(item, boxes))


def _mask(item: Study, boxes: Sequence[Box]) -> bytes | None:
    """Union of the masks of the findings with these boxes, as a one-bit PNG, or None."""
    masks = [found.mask for found in item.findings if found.box in boxes]
    return _png(Image.fromarray(np.logical_or.reduce(masks))) if masks else None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
