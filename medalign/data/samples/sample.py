"""Convert the members of a sample to a `Sample`, with all checks that a sample must pass.

The same checks run when a sample is packed (it is then refused by name) and when it is read (it is then replaced and
counted), so the trainer sees exactly what `shards.writer` documents.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from medalign.contracts import Sample
from medalign.data.samples import values
from medalign.data.samples.bad_sample import BadSample, image_name, sample_context, short_name
from medalign.data.samples.decode import decode_image, picture_header
from medalign.data.samples.git_lfs import describe_pointer
from medalign.data.samples.image_tags import TAG, check_count, strip_tags
from medalign.data.samples.json_fields import unique_fields

__all__ = [
    "ANSWER_TYPES",
    "REPORT_PROMPT",
    "SAMPLE_FIELDS",
    "TASKS",
    "BadSample",
    "check_fields",
    "decode_image",
    "image_name",
    "normalize_answer_type",
    "parse_fields",
    "picture_header",
    "sample_context",
    "to_sample",
]

REPORT_PROMPT = "Describe the findings in this image."
TASKS = ("vqa", "report")
ANSWER_TYPES = ("closed", "open", "")
SAMPLE_FIELDS = ("task", "question", "answer", "answer_type", "boxes")  # all others become Sample.metadata

_BOX_SLACK = 1.0  # pixels; annotation tools include or exclude the last pixel


def parse_fields(data: bytes) -> dict[str, Any]:
    """Parse the JSON member of a sample. Raises BadSample if it is not a JSON object."""
    if not data.strip():
        raise BadSample("annotation is empty")
    try:
        fields = json.loads(data, object_pairs_hook=unique_fields)
    except RecursionError as error:
        raise BadSample("annotation is not readable JSON (it is nested too deep)") from error
    except ValueError as error:
        raise BadSample(f"annotation is {describe_pointer(data) or f'not JSON ({error})'}") from error
    if not isinstance(fields, dict):
        raise BadSample(f"annotation is a JSON {type(fields).__name__}, not an object")
    return normalize_answer_type(fields)


def normalize_answer_type(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `answer_type` stripped and in lower case; other tools also write CLOSED or Open."""
    given = fields.get("answer_type")
    return {**fields, "answer_type": given.strip().lower()} if isinstance(given, str) else fields


def check_fields(fields: dict[str, Any], size: tuple[int, int] | None, images: int) -> None:
    """Check the fields of an annotation against the schema.

    Args:
        fields: the annotation.
        size: width and height of the first image in pixels, None without an image.
        images: number of images.

    Raises:
        BadSample: a field violates the schema; the message gives the first violation.
    """
    _check_values(fields)
    task = fields.get("task")
    if task not in TASKS:
        raise BadSample(f"task is {reprlib.repr(task)}; it must be 'vqa' or 'report'")
    for name in ("question", "answer") if task == "vqa" else ("report",):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            found = "empty" if text is None or text == "" else reprlib.repr(text)
            raise BadSample(f"{name} is {found}; task {task} requires text")
    question = fields.get("question") or ""
    if not isinstance(question, str):
        raise BadSample(f"question is {reprlib.repr(question)}, which is not text")
    asked, tags = strip_tags(question)
    check_count(tags, images)
    for name in ("answer", "report"):
        if isinstance(text := fields.get(name), str) and strip_tags(text)[1]:
            raise BadSample(f"the {name} contains {TAG}")
    if task == "vqa" and not asked.strip():
        raise BadSample(f"question is {reprlib.repr(question)}, which contains no text; task vqa requires it")
    answer_type = fields.get("answer_type") or ""
    if answer_type not in ANSWER_TYPES:
        raise BadSample(f"answer_type is {reprlib.repr(answer_type)}; it must be 'closed', 'open' or ''")
    boxes = fields.get("boxes") or []
    if not isinstance(boxes, list):
        raise BadSample(f"boxes is {reprlib.repr(boxes)}, which is not a list of [x0, y0, x1, y1]")
    if boxes and size is None:
        raise BadSample("boxes are given, but there is no image")
    for box in boxes:
        _check_box(box, size or (0, 0))


def _check_values(fields: dict[str, Any]) -> None:
    """Raise BadSample for invalid text or numbers in any field; the numbers of boxes are checked in `_check_box`."""
    for name, value in fields.items():
        if fault := values.fault(name):
            raise BadSample(f"the field {reprlib.repr(name)} {fault}")
        if fault := values.fault(value, numbers=name != "boxes"):
            raise BadSample(f"{short_name(name)} {fault}")


def _check_box(box: Any, size: tuple[int, int]) -> None:
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and abs(v) < math.inf for v in box):
        raise BadSample(f"box {reprlib.repr(box)} is not four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise BadSample(f"box {reprlib.repr(box)} is empty; x0 < x1 and y0 < y1 must hold")
    if max(x1, y1) <= 1 or (x1 - x0 < 1 and y1 - y0 < 1):
        extent = "a single pixel" if max(x1 - x0, y1 - y0) == 1 else "smaller than a pixel"
        raise BadSample(f"box {reprlib.repr(box)} is {extent}; boxes are in pixels, not fractions of the image")
    if min(x0, y0) < -_BOX_SLACK or x1 > size[0] + _BOX_SLACK or y1 > size[1] + _BOX_SLACK:
        raise BadSample(f"box {reprlib.repr(box)} is outside the image of {size[0]} x {size[1]} pixels")


def to_sample(
    shard: str,
    key: str,
    fields: dict[str, Any],
    images: Sequence[Image.Image],
    stored_size: tuple[int, int] | None = None,
) -> Sample:
    """Build a validated sample. A report without a question gets the default prompt; its answer is the report.

    Args:
        shard: name of the shard.
        key: key of the sample.
        fields: the annotation.
        images: in order; the boxes belong to the first.
        stored_size: width and height that the boxes refer to, if the first image was decoded at reduced scale. The
            boxes are scaled accordingly.

    Raises:
        BadSample: the sample violates the schema.
    """
    first = images[0] if images else None
    size = (stored_size or first.size) if first else None
    if first and size:
        _check_size(first.size, size)
    check_fields(fields, size, len(images))
    report = fields["task"] == "report"
    across, down = (first.width / size[0], first.height / size[1]) if first and size else (1.0, 1.0)
    boxes = fields.get("boxes") or []
    return Sample(
        key=key,
        shard=shard,
        task=fields["task"],
        question=strip_tags(fields.get("question") or "")[0].strip() or REPORT_PROMPT,
        answer=(fields["report"] if report else fields["answer"]).strip(),
        answer_type="" if report else fields.get("answer_type") or "",
        images=tuple(images),
        boxes=tuple((x0 * across, y0 * down, x1 * across, y1 * down) for x0, y0, x1, y1 in boxes),
        metadata={name: value for name, value in fields.items() if name not in SAMPLE_FIELDS},
    )


def _check_size(decoded: tuple[int, int], indexed: tuple[int, int]) -> None:
    """Raise BadSample if the index was built for other pixels, for example before EXIF orientation was applied."""
    if not any(decoded == tuple(-(-side // scale) for side in indexed) for scale in (1, 2, 4, 8)):
        width, height = indexed
        raise BadSample(
            f"image has {decoded[0]} x {decoded[1]} pixels, but the index lists {width} x {height}; rebuild it with "
            "`medalign shards index DIR`, and check the boxes"
        )
