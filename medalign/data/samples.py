"""Bytes of a shard's members to a `Sample`, and every check that a sample must pass.

The same checks run when a sample is packed (it is then refused by name) and when it is read (it is then replaced
and counted), so what is documented in `shards` is what the trainer sees.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from medalign.contracts import Sample
from medalign.data import dicom, values
from medalign.data.dicom import is_dicom
from medalign.errors import DataError

REPORT_PROMPT = "Describe the findings in this image."
TASKS = ("vqa", "report")
ANSWER_TYPES = ("closed", "open", "")
SAMPLE_FIELDS = ("task", "question", "answer", "answer_type", "boxes")  # the rest becomes Sample.metadata

_IMAGE_TAG = re.compile(r"<(?:image|img)[-_ ]?(?:placeholder|[0-9]+)?>", re.IGNORECASE)
_WINDOW = (0.5, 99.5)  # per cent of the pixels
_BOX_SLACK = 1.0  # pixels; annotators' tools count the last pixel in or out
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class BadSample(DataError):
    """This one sample cannot be used; its neighbours can. The message is the reason, or "shard/key: reason"."""


class naming:
    """Puts what it is about, if anything, before the reason of a BadSample raised inside."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self._what and isinstance(error, BadSample):
            raise BadSample(f"{self._what}: {error}") from error


def image_name(number: int, images: int) -> str:
    """ "image 2 of 3" for number 1 of three images; "" for an only image, which needs no name."""
    return f"image {number + 1} of {images}" if images > 1 else ""


def decode_image(data: bytes, at_least: int = 0) -> Image.Image:
    """The decoded picture, 8 bits a channel.

    A JPEG whose longer side is twice `at_least` or more is decoded at a half, a quarter or an eighth of its size, so
    that its longer side is still `at_least` pixels; 0 decodes it as stored. More than 8 bits of grey are windowed:
    the darkest and the brightest half per cent become black and white. DICOM is shown as its own tags say.

    Raises BadSample if the bytes are no picture or end too early.
    """
    try:
        if is_dicom(data):
            return dicom.picture(data)
        image = Image.open(io.BytesIO(data))
        if at_least and image.format in ("JPEG", "MPO"):
            longer = max(image.size)
            width, height = (max(1, -(-side * at_least // longer)) for side in image.size)
            image.draft(None, (width, height))
        image.load()
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({_reason(error)})") from error
    return _eight_bit(image) if image.mode.startswith(("I", "F")) else image


def _reason(error: Exception) -> str:
    """Pillow names the object in memory where it knows no format, which differs from run to run."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = np.percentile(values, _WINDOW)
    if low == high:  # almost all of one value; what differs from it must stay visible
        low, high = values.min(), values.max()
    shown = (values.clip(low, high) - low) * (255 / max(float(high - low), 1e-6))
    return Image.fromarray(np.rint(shown).astype(np.uint8))


def picture_header(data: bytes) -> tuple[str, int, int]:
    """Format ("png", "jpg" or "dcm"), width and height of a picture, without decoding its pixels."""
    try:
        if is_dicom(data):
            return "dcm", *dicom.picture_size(data)
        with Image.open(io.BytesIO(data)) as image:
            name, (width, height) = image.format or "unknown", image.size
    except _UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded ({_reason(error)})") from error
    if name not in ("PNG", "JPEG", "MPO"):
        raise BadSample(f"image is {name}; only PNG, JPEG and DICOM are read")
    return ("png" if name == "PNG" else "jpg"), width, height


def parse_fields(data: bytes) -> dict[str, Any]:
    """The JSON member of a sample as a dictionary. Raises BadSample if it is not one."""
    if not data.strip():
        raise BadSample("annotation is empty")
    try:
        fields = json.loads(data)
    except RecursionError as error:
        raise BadSample("annotation is not JSON that can be read (it is nested too deep)") from error
    except ValueError as error:
        raise BadSample(f"annotation is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise BadSample(f"annotation is a JSON {type(fields).__name__}, not an object")
    return fields


def check_fields(fields: dict[str, Any], size: tuple[int, int] | None) -> None:
    """Raises BadSample for the first field that breaks the schema; `size` is the picture's, None if there is none."""
    _check_values(fields)
    task = fields.get("task")
    if task not in TASKS:
        raise BadSample(f"task is {task!r}; known are 'vqa' and 'report'")
    for name in ("question", "answer") if task == "vqa" else ("report",):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            raise BadSample(f"{name} is {'empty' if text is None or text == '' else repr(text)}; task {task} needs it")
    if not isinstance(fields.get("question") or "", str):
        raise BadSample(f"question is {fields['question']!r}, not text")
    _check_tags(fields.get("question") or "")
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


def _check_values(fields: dict[str, Any]) -> None:
    """Raises BadSample for text or a number that is none, in any field; for boxes see `_check_box`."""
    for name, value in fields.items():
        if fault := values.fault(name):
            raise BadSample(f"the field {name!r} {fault}")
        if fault := values.fault(value, numbers=name != "boxes"):
            raise BadSample(f"{name} {fault}")


def _check_tags(question: str) -> None:
    """Raises BadSample for what other tools write into a text where a picture belongs."""
    tag = _IMAGE_TAG.search(question)
    if tag:
        raise BadSample(
            f"question holds {tag[0]!r}, which stands for a picture in the texts of other tools; give the picture as "
            "the sample's image, and leave the mark out"
        )


def _check_box(box: Any, size: tuple[int, int]) -> None:
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and abs(v) < math.inf for v in box):
        raise BadSample(f"box {box!r} is not four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise BadSample(f"box {box!r} is empty; x0 < x1 and y0 < y1 must hold")
    if min(x0, y0) < -_BOX_SLACK or x1 > size[0] + _BOX_SLACK or y1 > size[1] + _BOX_SLACK:
        raise BadSample(f"box {box!r} lies outside the image of {size[0]} x {size[1]} pixels")


def to_sample(
    shard: str,
    key: str,
    fields: dict[str, Any],
    images: Sequence[Image.Image],
    stored_size: tuple[int, int] | None = None,
) -> Sample:
    """A checked sample. A report without a question asks the default one; its answer is the report.

    Args:
        images: in their order; boxes are those of the first.
        stored_size: width and height that boxes refer to, where the first was decoded smaller; boxes shrink with it.
    """
    first = images[0] if images else None
    size = (stored_size or first.size) if first else None
    check_fields(fields, size)
    report = fields["task"] == "report"
    across, down = (first.width / size[0], first.height / size[1]) if first and size else (1.0, 1.0)
    boxes = fields.get("boxes") or []
    return Sample(
        key=key,
        shard=shard,
        task=fields["task"],
        question=(fields.get("question") or "").strip() or REPORT_PROMPT,
        answer=(fields["report"] if report else fields["answer"]).strip(),
        answer_type="" if report else fields.get("answer_type") or "",
        images=tuple(images),
        boxes=tuple((x0 * across, y0 * down, x1 * across, y1 * down) for x0, y0, x1, y1 in boxes),
        metadata={name: value for name, value in fields.items() if name not in SAMPLE_FIELDS},
    )
