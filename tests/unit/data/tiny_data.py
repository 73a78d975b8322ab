"""Small real images and records."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from medalign.data.shards.records import Picture, Record


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
