"""Generates answers with a trained student, with the finish reason and the question's attention to the image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from PIL import Image

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.loader import join_usable
from medalign.data.batches.prompts import pad_token_id
from medalign.data.samples.bad_sample import BadSample
from medalign.decoding.base import Decoding
from medalign.errors import DataError
from medalign.evaluation.grounding import grounding
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.predictions import LENGTH, STOP
from medalign.geometry import CanvasFrame
from medalign.student.model import Student

GROUPING = ("patient", "question_type", "finding", "modality")  # fields of an annotation that a prediction keeps


@dataclass(frozen=True)
class Answer:
    """One answer. `attention` is the question's attention to its first image, N values, or None without an image."""

    text: str
    attention: list[float] | None
    finish_reason: str = ""  # STOP: an end token; LENGTH: the limit of new tokens


@dataclass(frozen=True)
class PredictionBatch:
    """The predictions of a batch, each with the place of its sample in the batch, and why samples were skipped."""

    rows: list[tuple[int, Prediction]]
    unreadable: tuple[str, ...]  # "shard/key: reason" of each skipped sample


def generate_answers(student: Student, tokenizer: Any, batch: Batch, decoding: Decoding) -> list[Answer]:
    """Generate answers.

    Args:
        student: the trained student.
        tokenizer: the student's tokenizer.
        batch: questions, left-padded.
        decoding: the method, beams or sampling, and the limit of an answer.

    Returns:
        One answer per question.
    """
    ends = student.end_tokens
    ids, maps_IN = decoding.method.generate(
        student, batch, decoding, pad_token_id=pad_token_id(tokenizer), eos_token_id=ends
    )
    words = [list(takewhile(lambda token: token not in ends, row)) for row in ids.tolist()]
    texts = [text.strip() for text in tokenizer.batch_decode(words, skip_special_tokens=True)]
    first: dict[int, list[float]] = {}
    if maps_IN is not None:
        for image, sample in enumerate(batch.image_sample.tolist()):
            first.setdefault(sample, maps_IN[image].tolist())
    reasons = finish_reasons(ids, student.end_tokens)
    return [Answer(text, first.get(row), reasons[row]) for row, text in enumerate(texts)]


def finish_reasons(ids_BT: torch.Tensor, ends: Sequence[int]) -> list[str]:
    """Return why each answer ended.

    Args:
        ids_BT: generated tokens.
        ends: token ids that end an answer.

    Returns:
        STOP for an answer that contains an end token, otherwise LENGTH.
    """
    ended_B = torch.isin(ids_BT, torch.tensor(ends, device=ids_BT.device)).any(1)
    return [STOP if ended else LENGTH for ended in ended_B.tolist()]


def predict(
    student: Student,
    tokenizer: Any,
    collator: Collator,
    samples: Sequence[Sample | BadSample],
    *,
    decoding: Decoding,
    device: torch.device,
) -> PredictionBatch:
    """Answer a batch.

    Args:
        student: the trained student.
        tokenizer: the student's tokenizer.
        collator: makes left-padded batches of questions.
        samples: samples, or why they could not be read.
        decoding: the method, beams or sampling, and the limit of an answer.
        device: the student's device.
    """
    places, batch, reasons = join_usable(collator, samples)
    if batch is None:
        return PredictionBatch([], reasons)
    rows = []
    answers = generate_answers(student, tokenizer, batch.to(device), decoding)
    for place, given, (question_cut, _) in zip(places, answers, batch.cuts, strict=True):
        sample = samples[place]
        assert isinstance(sample, Sample)
        row = _prediction(student, sample, given)
        row.truncated = question_cut > 0
        rows.append((place, row))
    return PredictionBatch(rows, reasons)


def _prediction(student: Student, sample: Sample, given: Answer) -> Prediction:
    row = Prediction(
        key=sample.key,
        task=sample.task,
        question=sample.question,
        answer=sample.answer,
        answer_type=sample.answer_type,
        prediction=given.text,
        finish_reason=given.finish_reason,
        empty=not given.text,
        image=digest(sample.images),
        **_annotated(sample.metadata),
    )
    if given.attention is None:
        return row
    frame = CanvasFrame(*sample.images[0].size)
    row.attention, row.image_size = given.attention, (frame.width, frame.height)
    row.boxes = [list(box) for box in sample.boxes]
    try:
        ground = grounding(given.attention, sample.boxes, frame, student.spec.grid)
    except ValueError as error:
        raise DataError(
            f"{sample.shard}/{sample.key}: {error}; check the weights of the student and of its base"
        ) from error
    if ground is not None:
        row.attention_inside, row.box_area = ground.inside, ground.area
        row.pointing_hit, row.pointing_chance = ground.hit, ground.chance
    return row


def digest(images: Sequence[Image.Image]) -> str:
    """Return 64 bits of the SHA-256 of the images' sizes and pixels in hexadecimal, "" without an image."""
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.mode} {image.size}".encode())
        found.update(image.tobytes())
    return found.hexdigest()[:16] if images else ""


def _annotated(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the annotation by which scores are grouped, as far as it has them."""
    found: dict[str, Any] = {name: str(metadata[name]) for name in GROUPING if metadata.get(name) not in (None, "")}
    options = metadata.get("options")
    if isinstance(options, list) and all(isinstance(option, str) for option in options):
        found["options"] = options
    return found
