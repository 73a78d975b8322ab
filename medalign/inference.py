"""Uses a trained student to answer one question or to evaluate data sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from medalign import distributed, pipeline
from medalign.checkpoint import export
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.data.samples import values
from medalign.data.samples.bad_sample import BadSample, sample_context
from medalign.data.samples.decode import decode_image, has_several_frames
from medalign.data.samples.image_tags import check_count, strip_tags
from medalign.data.shards.index import ShardIndex
from medalign.data.storage.byte_ranges import is_remote
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generation import Answer, PredictionBatch, generate_answers, predict
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.predictions import LENGTH
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluation.report.pictures import overlay
from medalign.evaluation.scores_file import format_scores, require_no_longer
from medalign.evaluation.tally import Tally
from medalign.evaluation.unfinished import UnfinishedEvaluation
from medalign.observability.files import write_text
from medalign.observability.progress import ProgressReporter
from medalign.run_folder import EvaluationFolder, find_run
from medalign.stop_signals import StopSignals, stop_signals
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
    """Answer one question about images. A warning is logged if the question or the answer is cut off, or empty.

    Args:
        run: a run, a checkpoint or an export.
        images: image files.
        question: the question.
        picture: file for the attention to the first image as an overlay, or None.
        max_new_tokens: limit of the answer, in tokens.
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
    student, tokenizer, collator = open_student(run, base, len(pictures), max_length)
    batch = collator([sample]).to(distributed.device())
    if batch.truncated:
        limit = collator.encoder.max_length
        log.warning("the question is truncated to %d tokens; --max-length raises the limit", limit)
    given = generate_answers(student, tokenizer, batch, max_new_tokens)[0]
    if picture is not None and given.attention is not None:
        overlay(pictures[0], given.attention, student.spec.grid).save(picture)
        log.info("overlay: %s", picture)
    if not given.text:
        log.warning("(empty answer)")
    if given.finish_reason == LENGTH:
        log.warning("the answer is cut off at %d tokens; --max-new-tokens raises the limit", max_new_tokens)
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
    max_skip_fraction: float = 0.01,
    base: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> Path:
    """Evaluate a run on shards, in one process.

    If it ends early, the predictions so far remain in a hidden file that the log names, and the same call resumes it.
    USR1 and TERM end it after the current batch.

    Args:
        run: a run, a checkpoint or an export.
        data: shard folders.
        name: name of the evaluation; by default that of the first shard folder.
        batch_size: questions per batch.
        limit: evaluate only the first samples.
        max_new_tokens: limit of an answer, in tokens.
        max_length: limit of a question and one image, in tokens; by default that of the training.
        max_skip_fraction: fraction of the samples that may be unreadable.
        base: folder of the base model, if it has moved since the training.
        overwrite: whether an evaluation of more samples with the same name may be replaced.
        command: the command line, for scores.json.

    Returns:
        The folder that contains predictions.jsonl and scores.json.

    Raises:
        ConfigError: an argument is not valid, the student cannot be used, there are several processes, or an evaluation
            of more samples would be replaced.
        DataError: more than `max_skip_fraction` of the samples cannot be read.
        Stopped: a signal ended it.
    """
    _require_one_process()
    folder = EvaluationFolder(_evaluation_folder(run, data, name))
    indexes = _open(data)
    planned = _planned(indexes, limit)
    if not overwrite:
        require_no_longer(folder, sum(planned))
    student, tokenizer, collator = open_student(run, base, max(i.max_images for i in indexes), max_length)
    longest = collator.encoder.max_length
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "max_length": longest,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": distributed.device().type,
    }
    origin = {**describe_weights(export.find_export(run)), "shards": [list(index.fingerprint()) for index in indexes]}
    unfinished = UnfinishedEvaluation(folder.predictions, {**settings, **origin, "versions": versions()})
    done = unfinished.resume(indexes, planned, batch_size)
    tally = Tally(max_skip_fraction, list(done.rows), done.unreadable)
    ask = partial(
        predict,
        student,
        tokenizer,
        collator=collator,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=distributed.device(),
    )
    with stop_signals() as signals:
        unfinished.append(_rows(ask, indexes, done.starts, planned, tally, signals))
    tally.warn(longest, max_new_tokens)
    facts = {
        "name": folder.path.name,
        "data": [place if is_remote(place) else str(Path(place).resolve()) for place in data],
        "grid": [student.spec.grid.rows, student.spec.grid.columns],
        "samples": sum(map(len, indexes)),
        **settings,
        **tally.counts(),
        "provenance": {**origin, "settings": settings, "command": command, "versions": versions()},
    }
    text = format_scores(tally.rows, facts)
    unfinished.finish()
    write_text(folder.scores, text)
    return folder.path


def _require_one_process() -> None:
    if (processes := distributed.world_size()) > 1:
        raise ConfigError(
            f"medalign evaluate was started as {processes} processes, but it runs in one; start it without a launcher, "
            "or with one task"
        )


def _planned(indexes: Sequence[ShardIndex], limit: int | None) -> list[int]:
    """Return how many samples of each folder are evaluated: all, or the first `limit` in the order of the folders."""
    counts: list[int] = []
    for index in indexes:
        left = len(index) if limit is None else limit - sum(counts)
        counts.append(min(len(index), left))
    return counts


def _open(data: Sequence[str]) -> list[ShardIndex]:
    """Open the index of each folder. Raises ConfigError if two folders contain the same samples."""
    indexes = [ShardIndex.open(place) for place in data]
    places: dict[tuple[str, ...], str] = {}
    for place, index in zip(data, indexes, strict=True):
        content = index.fingerprint()
        if content in places:
            raise ConfigError(
                f"--data {places[content]} and {place} contain the same samples, which would count twice; give only "
                "one of them"
            )
        places[content] = place
    return indexes


def _evaluation_folder(run: Path, data: Sequence[str], name: str | None) -> Path:
    """Where an evaluation is written: by default it is called as the first folder of shards."""
    home, prefix = find_run(run)
    setting = f"--name {name!r}"
    if name is None:
        name, setting = _name_of(data[0]), f"no name can be derived from --data {data[0]}: --name"
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"{setting} must be the plain name of a folder in {home.evaluation_root}")
    return home.evaluation(prefix + name).path


def _name_of(place: str) -> str:
    if not is_remote(place):
        return Path(os.path.abspath(place)).name
    address = urlsplit(place)
    return PurePosixPath(address.path).name or address.netloc


def _rows(
    ask: Callable[..., Iterator[PredictionBatch]],
    indexes: Sequence[ShardIndex],
    starts: Sequence[int],
    planned: Sequence[int],
    tally: Tally,
    signals: StopSignals,
) -> Iterator[Prediction]:
    """Yield the predictions that remain, folder by folder, and add them to `tally`.

    Args:
        ask: predicts samples of an index.
        indexes: the shard folders.
        starts: the first sample of each folder that remains.
        planned: how many samples of each folder are evaluated.
        tally: has the predictions so far.
        signals: what this process has received.

    Raises:
        Stopped: a signal asked the process to end.
    """
    with ProgressReporter("evaluate", sum(planned), "samples") as progress:
        progress.add(sum(starts))
        for folder, (index, start, end) in enumerate(zip(indexes, starts, planned, strict=True)):
            for predicted in ask(index=index, indices=range(start, end)) if start < end else ():
                for row in predicted.rows:
                    row.folder = folder
                    yield row
                tally.add(predicted)
                progress.add(len(predicted.rows) + len(predicted.unreadable))
                if signals.request is not None and tally.seen < sum(planned):
                    raise signals.request(f"the evaluation stopped after {tally.seen} of {sum(planned)} samples")


def open_student(
    run: Path, base: str | None = None, max_images: int = 1, max_length: int | None = None
) -> tuple[Student, Any, Collator]:
    """Load the trained student of a run.

    Args:
        run: a run, a checkpoint or an export.
        base: folder of the base model, if it has moved since the training.
        max_images: maximum number of images per question.
        max_length: limit of a question and one image, in tokens; by default that of the training. Each further image
            adds its tokens to the limit.

    Returns:
        The student in the precision of the run, its tokenizer, and a collator for questions.
    """
    source = export.find_export(run)
    student = export.load_export(source, export.precision(source), distributed.device(), base)
    config = export.settings(source)
    processor = loading.load_processor(config if base is None else type(config)(**{**vars(config), "path": base}))
    limit = max_length or export.max_length(source)
    collator = pipeline.build_question_collator(student.spec, processor, limit, max_images)
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
