"""A trained student put to use: one question, or a whole data set. Composes rooms, like `run`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from medalign import distributed
from medalign.checkpoint import export
from medalign.contracts import Sample
from medalign.data import values
from medalign.data.bad_sample import BadSample, naming
from medalign.data.collate import Collator, TowerView
from medalign.data.decode import decode_image, has_several_frames
from medalign.data.image_tags import check_count, strip_tags
from medalign.data.index import ShardIndex
from medalign.data.prompts import PromptEncoder
from medalign.data.storage import is_remote
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generate import Answer, Predicted, answer, predict
from medalign.evaluation.metrics import Prediction, score, unfinished, write_predictions
from medalign.evaluation.metrics.predictions import LENGTH
from medalign.evaluation.pictures import overlay
from medalign.evaluation.runs import home_of
from medalign.evaluation.tally import Tally
from medalign.observability.files import write_text
from medalign.observability.progress import Progress
from medalign.student import loading
from medalign.student.model import Student

log = logging.getLogger("medalign")


def generate(
    run: Path,
    images: Sequence[Path],
    question: str,
    picture: Path | None,
    max_new_tokens: int,
    max_length: int | None = None,
    base: str | None = None,
) -> Answer:
    """The answer to one question; draws its attention to the first image into `picture` if that is named.

    What cannot be seen in the text (it is empty, or was cut) is told in the log.
    """
    question = _asked(question, len(images))
    for image in images:
        if not image.is_file():
            raise DataError(f"--image {image} {'is a folder; name a file' if image.is_dir() else 'does not exist'}")
    if picture is not None:
        _require_picture(picture)
    pictures = []
    for image in images:
        with naming(f"--image {image}"):
            data = image.read_bytes()
            pictures.append(decode_image(data))
            if has_several_frames(data):
                log.warning("--image %s has several frames; the first is shown", image)
    sample = Sample(images[0].stem, "none", "vqa", question, "?", "open", tuple(pictures))
    student, tokenizer, collator = open_student(run, base, len(pictures), max_length)
    batch = collator([sample]).to(distributed.device())
    if batch.truncated:
        log.warning("the question is cut to %d tokens; --max-length raises the limit", collator.encoder.max_length)
    given = answer(student, tokenizer, batch, max_new_tokens)[0]
    if picture is not None and given.attention is not None:
        overlay(pictures[0], given.attention, student.anatomy.grid).save(picture)
        log.info("overlay: %s", picture)
    if not given.text:
        log.warning("(empty answer)")
    if given.finish_reason == LENGTH:
        log.warning("the answer is cut at %d tokens; --max-new-tokens raises the limit", max_new_tokens)
    return given


def evaluate(
    run: Path,
    data: Sequence[str],
    *,
    name: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    max_bad_share: float = 0.01,
    base: str | None = None,
) -> Path:
    """Score a run on shards. Returns the folder with predictions.jsonl and scores.json.

    Raises DataError when more than `max_bad_share` of the samples cannot be read. Whatever ends it early, the
    predictions so far stay in the folder, in a hidden file that the log names.
    """
    folder = _evaluation_folder(run, data, name)
    indexes = _open(data)
    student, tokenizer, collator = open_student(run, base, max(i.most_images for i in indexes), max_length)
    ask = partial(
        predict,
        student,
        tokenizer,
        collator=collator,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=distributed.device(),
    )
    tally = Tally(max_bad_share)
    _write_predictions(folder / "predictions.jsonl", _rows(ask, indexes, limit, tally))
    grid, longest = student.anatomy.grid, collator.encoder.max_length
    tally.warn(longest, max_new_tokens)
    facts = {
        "name": folder.name,
        "data": [place if is_remote(place) else str(Path(place).resolve()) for place in data],
        "grid": [grid.rows, grid.columns],
        "samples": sum(map(len, indexes)),
        "limit": limit,
        "max_length": longest,
        "max_new_tokens": max_new_tokens,
        **tally.counts(),
    }
    write_text(folder / "scores.json", json.dumps(score(tally.rows) | facts, indent=2) + "\n")
    return folder


def _open(data: Sequence[str]) -> list[ShardIndex]:
    """The index of each folder. Raises ConfigError where two hold the same samples, which would count twice."""
    indexes = [ShardIndex.open(place) for place in data]
    places: dict[tuple[str, ...], str] = {}
    for place, index in zip(data, indexes, strict=True):
        content = index.fingerprint()
        if content in places:
            raise ConfigError(f"--data {places[content]} and {place} hold the same samples; name one of them")
        places[content] = place
    return indexes


def _evaluation_folder(run: Path, data: Sequence[str], name: str | None) -> Path:
    """Where an evaluation is written: by default it is called as the first folder of shards."""
    home, prefix = home_of(run)
    said = f"--name {name!r}"
    if name is None:
        name, said = _name_of(data[0]), f"--data {data[0]} names no evaluation: --name"
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"{said} must be the plain name of a folder in {home / 'evaluation'}")
    return home / "evaluation" / (prefix + name)


def _name_of(place: str) -> str:
    if not is_remote(place):
        return Path(os.path.abspath(place)).name
    address = urlsplit(place)
    return PurePosixPath(address.path).name or address.netloc


def _rows(
    ask: Callable[..., Iterator[Predicted]], indexes: Sequence[ShardIndex], limit: int | None, tally: Tally
) -> Iterator[Prediction]:
    """The predictions for all samples, or for the first `limit`, folder by folder; `tally` counts along."""
    left = sum(map(len, indexes)) if limit is None else min(limit, sum(map(len, indexes)))
    with Progress("evaluate", left, "samples") as progress:
        for number, index in enumerate(indexes):
            numbers = range(min(left, len(index)))
            left -= len(numbers)
            for predicted in ask(index=index, numbers=numbers):
                for row in predicted.rows:
                    row.folder = number
                    yield row
                tally.add(predicted)
                progress.add(len(predicted.rows) + len(predicted.unreadable))


def _write_predictions(path: Path, rows: Iterator[Prediction]) -> None:
    try:
        write_predictions(path, rows)
    finally:
        if unfinished(path).is_file():
            log.error("the evaluation ended early; its predictions so far are in %s", unfinished(path))


def open_student(
    run: Path, base: str | None = None, most_images: int = 1, max_length: int | None = None
) -> tuple[Student, Any, Collator]:
    """The trained student of a run in the run's precision, its tokenizer, and a collator for questions.

    A question and one image have `max_length` tokens, by default those of the training, and each of `most_images`
    after that its own.
    """
    source = export.find(run)
    student = export.read(source, export.precision(source), distributed.device(), base)
    config = export.settings(source)
    processor = loading.load_processor(config if base is None else type(config)(**{**vars(config), "path": base}))
    anatomy = student.anatomy
    eye = loading.eye(processor, anatomy.image_size)
    encoder = PromptEncoder(
        processor,
        image_token_id=anatomy.image_token_id,
        tokens_per_image=anatomy.grid.size,
        max_length=(max_length or export.max_length(source)) + (most_images - 1) * anatomy.grid.size,
        most_images=most_images,
        setting="--max-length",
    )
    student.end_with(encoder.end_token_id)
    view = TowerView(eye.size, eye.mean, eye.std)
    collator = Collator(encoder, view, None, anatomy.grid, padding_side="left", with_answer=False)
    return student, processor.tokenizer, collator


def _asked(question: str, images: int) -> str:
    """The question as training would read it. Raises ConfigError or BadSample, which name --question."""
    try:
        question.encode()
    except UnicodeEncodeError as error:  # what the shell gives is decoded so that no byte is lost
        raise ConfigError(
            f"--question is not text in UTF-8: {question[error.start]!r} after {error.start} characters; set the "
            "terminal to UTF-8 and type it again"
        ) from error
    with naming("--question"):
        if fault := values.fault(question):
            raise BadSample(f"the text {fault}")
        text, tags = strip_tags(question)
        check_count(tags, images)
    if not text.strip():
        raise ConfigError("--question is empty; name what to ask")
    return text.strip()


def _require_picture(path: Path) -> None:
    """Raise ConfigError where no picture can be written, before a model is loaded for it."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--overlay {path}: name a .png or .jpg file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--overlay {path}: the folder {path.absolute().parent} does not exist")
