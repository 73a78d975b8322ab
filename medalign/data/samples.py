"""Bytes of a shard's members to a `Sample`, and every check that a sample must pass.

The same checks run when a sample is packed (it is then refused by name) and when it is read (it is then replaced
and counted), so what is documented in `shards` is what the trainer sees.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.errors import DataError

REPORT_PROMPT = "Describe the findings in this image."
TASKS = ("vqa", "report")
ANSWER_TYPES = ("closed", "open", "")
SAMPLE_FIELDS = ("task", "question", "answer", "answer_type", "boxes")  # the rest becomes Sample.metadata

_BOX_SLACK = 1.0  # pixels; annotators' tools count the last pixel in or out
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class BadSample(DataError):
    """This one sample cannot be used; its neighbours can. The message is the reason, or "shard/key: reason"."""


def decode_image(data: bytes) -> Image.Image:
    """The decoded picture, as stored; more than 8 bits of grey become 8, linearly from darkest to brightest.

    Raises BadSample if the bytes are no picture or end too early.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({error})") from error
    return _eight_bit(image) if image.mode.startswith(("I", "F")) else image


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))


def picture_header(data: bytes) -> tuple[str, int, int]:
    """Format ("png" or "jpg"), width and height of a picture, without decoding its pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            name, (width, height) = image.format or "unknown", image.size
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({error})") from error
    if name not in ("PNG", "JPEG", "MPO"):
        raise BadSample(f"image is {name}; only PNG and JPEG are read")
    return ("png" if name == "PNG" else "jpg"), width, height


def parse_fields(data: bytes) -> dict[str, Any]:
    """The JSON member of a sample as a dictionary. Raises BadSample if it is not one."""
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise BadSample(f"annotation is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise BadSample(f"annotation is a JSON {type(fields).__name__}, not an object")
    return fields


def check_fields(fields: dict[str, Any], size: tuple[int, int] | None) -> None:
    """Raises BadSample for the first field that breaks the schema; `size` is the picture's, None if there is none."""
    task = fields.get("task")
    if task not in TASKS:
        raise BadSample(f"task is {task!r}; known are 'vqa' and 'report'")
    for name in ("question", "answer") if task == "vqa" else ("report",):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            raise BadSample(f"{name} is {'empty' if text is None or text == '' else repr(text)}; task {task} needs it")
    if not isinstance(fields.get("question") or "", str):
        raise BadSample(f"question is {fields['question']!r}, not text")
    answer_type = fields.get("answer_type") or ""
    if answer_type not in ANSWER_TYPES:
        raise BadSample(f"answer_type is {answer_type!r}; known are 'closed', 'open' and ''")
    boxes = fields.get("boxes") or []
    if not isinstance(boxes, list):
        raise BadSample(f"boxes is {boxes!r}, not a list of [x0, y0, x1, y1]")
    if boxes and size is None:
        raise BadSample("boxes are given, but there is no image")
    for box in boxes:
        _check_box(box, size or (0, 0))


def _check_box(box: Any, size: tuple[int, int]) -> None:
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise BadSample(f"box {box!r} is not four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise BadSample(f"box {box!r} is empty; x0 < x1 and y0 < y1 must hold")
    if min(x0, y0) < -_BOX_SLACK or x1 > size[0] + _BOX_SLACK or y1 > size[1] + _BOX_SLACK:
        raise BadSample(f"box {box!r} lies outside the image of {size[0]} x {size[1]} pixels")


def to_sample(shard: str, key: str, fields: dict[str, Any], image: Image.Image | None) -> Sample:
    """A checked sample. A report without a question asks the default one; its answer is the report."""
    check_fields(fields, image.size if image else None)
    report = fields["task"] == "report"
    return Sample(
        key=key,
        shard=shard,
        task=fields["task"],
        question=(fields.get("question") or "").strip() or REPORT_PROMPT,
        answer=(fields["report"] if report else fields["answer"]).strip(),
        answer_type="" if report else fields.get("answer_type") or "",
        images=(image,) if image else (),
        boxes=tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in fields.get("boxes") or []),
        metadata={name: value for name, value in fields.items() if name not in SAMPLE_FIELDS},
    )
