"""Loads a trained student and asks it one question."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medalign import distributed, pipeline
from medalign.checkpoint import export
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.data.samples import values
from medalign.data.samples.bad_sample import BadSample, sample_context
from medalign.data.samples.decode import decode_image, has_several_frames
from medalign.data.samples.image_tags import check_count, strip_tags
from medalign.decoding.base import Decoding, Method
from medalign.decoding.checks import require_methods
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generation import Answer, generate_answers
from medalign.evaluation.metrics.predictions import LENGTH
from medalign.evaluation.report.pictures import overlay
from medalign.student import loading
from medalign.student.generation_settings import keep_only_tokens
from medalign.student.model import Student

log = logging.getLogger("medalign")
_GREEDY = Decoding()


def generate(
    run: Path,
    images: Sequence[Path],
    question: str,
    picture: Path | None = None,
    decoding: Decoding = _GREEDY,
    max_length: int | None = None,
    base: str | None = None,
) -> Answer:
    """Answer one question about images. A warning is logged if the question or the answer is cut off, or empty.

    Args:
        run: a run, a checkpoint or an export.
        images: image files.
        question: the question.
        picture: file for the attention to the first image as an overlay, or None.
        decoding: the method, beams or sampling, and the limit of the answer.
        max_length: limit of the question and one image, in tokens; by default that of the training.
        base: folder of the base model, if it has moved since the training.

    Returns:
        The answer.

    Raises:
        ConfigError: an argument is not valid, or the student cannot be used.
        DataError: an image cannot be read.
    """
    question = _read_question(question, len(images))
    for image in images:
        if not image.is_file():
            raise DataError(f"--image {image} {'is a folder; name a file' if image.is_dir() else 'does not exist'}")
    if picture is not None:
        _require_picture(picture)
    pictures = []
    for image in images:
        with sample_context(f"--image {image}"):
            data = image.read_bytes()
            pictures.append(decode_image(data))
            if has_several_frames(data):
                log.warning("--image %s has several frames; only the first is used", image)
    sample = Sample(images[0].stem, "none", "vqa", question, "?", "open", tuple(pictures))
    student, tokenizer, collator = open_student(run, base, len(pictures), max_length, [decoding.method])
    batch = collator([sample]).to(distributed.device())
    if batch.truncated:
        limit = collator.encoder.max_length
        log.warning("the question is truncated to %d tokens; --max-length raises the limit", limit)
    given = generate_answers(student, tokenizer, batch, decoding.prepare(student, collator))[0]
    if picture is not None and given.attention is not None:
        overlay(pictures[0], given.attention, student.spec.grid).save(picture)
        log.info("overlay: %s", picture)
    if not given.text:
        log.warning("(empty answer)")
    if given.finish_reason == LENGTH:
        log.warning("the answer is cut off at %d tokens; --max-new-tokens raises the limit", decoding.max_new_tokens)
    return given


def open_student(
    run: Path,
    base: str | None = None,
    max_images: int = 1,
    max_length: int | None = None,
    methods: Sequence[Method] = (),
) -> tuple[Student, Any, Collator]:
    """Load the trained student of a run.

    Args:
        run: a run, a checkpoint or an export.
        base: folder of the base model, if it has moved since the training.
        max_images: maximum number of images per question.
        max_length: limit of a question and one image, in tokens; by default that of the training. Each further image
            adds its tokens to the limit.
        methods: the decoding methods that must work with the student.

    Returns:
        The student in the precision of the run, its tokenizer, and a collator for questions.

    Raises:
        ConfigError: the student cannot be used, or a method cannot work with it.
    """
    source = export.find_export(run)
    config = export.settings(source)
    config = config if base is None else replace(config, path=base)
    require_methods(methods, config)
    student = export.load_export(source, export.precision(source), distributed.device(), base)
    processor = loading.load_processor(config)
    limit = max_length or export.max_length(source)
    collator = pipeline.build_question_collator(student.spec, processor, limit, max_images)
    keep_only_tokens(student.spec.model)
    student.end_with(collator.encoder.end_token_id)
    return student, processor.tokenizer, collator


def _read_question(question: str, images: int) -> str:
    """Return the question as training would read it. Raises ConfigError or BadSample, which name --question."""
    try:
        question.encode()
    except UnicodeEncodeError as error:  # bytes that are not UTF-8 arrive as surrogates
        raise ConfigError(
            f"--question is not text in UTF-8: {question[error.start]!r} after {error.start} characters; set the "
            "terminal to UTF-8 and type it again"
        ) from error
    with sample_context("--question"):
        if fault := values.fault(question):
            raise BadSample(f"the text {fault}")
        text, tags = strip_tags(question)
        check_count(tags, images)
    if not text.strip():
        raise ConfigError("--question is empty; name what to ask")
    return text.strip()


def _require_picture(path: Path) -> None:
    """Raise ConfigError if the overlay cannot be written, before a model is loaded."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--overlay {path}: the suffix must be .png or .jpg")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--overlay {path}: the folder {path.absolute().parent} does not exist")
