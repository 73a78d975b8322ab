"""Answers the questions of a JSONL file, on any number of ranks.

A line is an object with the fields of `annotations.jsonl` ([Datasets](datasets.md)):

  id           the key, unique
  image        path of an image relative to the file, or a list of paths in order; null without an image
  question     the question
  task         "vqa" (default) or "report"
  answer       the reference, if there is one; "report" for reports
  answer_type  "closed" or "open"
  boxes        of what the question is about, as [x0, y0, x1, y1] in pixels of the first image
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medalign import distributed
from medalign.answering import Work, answer_all, describe_answering
from medalign.checkpoint import export
from medalign.contracts import Sample
from medalign.data.samples.bad_sample import BadSample, sample_context
from medalign.data.samples.decode import decode_image
from medalign.data.samples.image_tags import strip_tags
from medalign.data.samples.json_fields import unique_fields
from medalign.data.samples.sample import check_fields, normalize_answer_type, to_sample
from medalign.datasets.image_fields import stated_images
from medalign.decoding.base import Decoding
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generation import predict
from medalign.evaluation.metrics.predictions import Prediction, format_prediction
from medalign.evaluation.provenance import describe_weights, versions
from medalign.inference import open_student
from medalign.observability.files import write_text
from medalign.stop_signals import stop_signals
from medalign.work_queue import joined_ranks

_GREEDY = Decoding()


class QuestionFile:
    """The questions of a JSONL file. All lines are checked at once; images are read later.

    Args:
        path: the file.

    Raises:
        DataError: a line is not a question; the message names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--input {path} cannot be read as text in UTF-8: {error}") from error
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        self._rows = [self._parse(line, number) for number, line in lines]
        if not self._rows:
            raise DataError(f"--input {path} has no line; write one JSON object per question")
        keys: set[str] = set()
        for row, (number, _) in zip(self._rows, lines, strict=True):
            if row["id"] in keys:
                raise DataError(f"--input {path}, line {number}: the id {row['id']!r} occurs twice; make it unique")
            keys.add(row["id"])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Relative length of each question, int64: by number of images, then by characters."""
        rows = [self._rows[i] for i in indices]
        return np.array([(len(row["images"]) << 32) + len(row["question"]) for row in rows], dtype=np.int64)

    @property
    def max_images(self) -> int:
        """Largest number of images of a question, at least 1."""
        return max(1, *(len(row["images"]) for row in self._rows))

    @property
    def with_reference(self) -> set[str]:
        """Keys of the questions whose right answer is given."""
        return {row["id"] for row in self._rows if row["reference"]}

    def read(self, i: int) -> Sample:
        """Read question i with its images. Raises BadSample if an image cannot be used."""
        row, images = self._rows[i], []
        for name in row["images"]:
            with sample_context(f"{self.path.name}/{row['id']}: {name}"):
                try:
                    images.append(decode_image((self.path.parent / name).read_bytes()))
                except OSError as error:
                    raise BadSample(f"it cannot be read: {error.strerror}") from error
        with sample_context(f"{self.path.name}/{row['id']}"):
            return to_sample(self.path.name, row["id"], row["fields"], images)

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            with sample_context(f"--input {self.path}, line {number}"):
                return _checked(json.loads(line, object_pairs_hook=unique_fields))
        except (ValueError, RecursionError) as error:
            raise DataError(f"--input {self.path}, line {number} is not JSON: {error}; correct the line") from error


def _checked(row: Any) -> dict[str, Any]:
    """Return the fields of a line as those of an annotation. Raises BadSample with the first fault."""
    if not isinstance(row, dict):
        raise BadSample(f"it is a JSON {type(row).__name__}; write an object")
    row = normalize_answer_type(row)
    for name in ("id", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise BadSample(f"{name} is {row.get(name)!r}; write a text")
    names = stated_images(row)
    if not all(isinstance(name, str) for name in names):
        raise BadSample("the paths of images must be texts")
    task = "vqa" if row.get("task") in (None, "") else row["task"]
    name = "report" if task == "report" else "answer"
    reference = row.get(name) not in (None, "")
    fields = {**row, "task": task, name: row[name] if reference else "?"}  # a sample has an answer
    check_fields({**fields, "boxes": []}, None, len(names))  # boxes are checked when the image is there
    if row.get("boxes") and not names:
        raise BadSample("boxes are given, but there is no image")
    question = strip_tags(row["question"])[0].strip()
    return {"id": row["id"], "question": question, "reference": reference, "images": names, "fields": fields}


def generate_file(
    run: Path,
    questions: Path,
    output: Path,
    *,
    batch_size: int = 32,
    decoding: Decoding = _GREEDY,
    max_length: int | None = None,
    max_skip_fraction: float = 0.0,
    base: str | None = None,
) -> Path:
    """Answer the questions of a file. Under a launcher every rank must call it, and answers a share.

    It resumes and ends as `medalign.evaluate` does.

    Args:
        run: a run, a checkpoint or an export.
        questions: the JSONL file.
        output: the new file of predictions, in the order of the questions. A line has no `answer` if the question has
            no reference.
        batch_size: questions per batch.
        decoding: the method, beams or sampling, and the limit of an answer.
        max_length: limit of a question and one image, in tokens; by default that of the training.
        max_skip_fraction: fraction of the questions whose images may be unreadable.
        base: folder of the base model, if it has moved since the training.

    Returns:
        `output`.

    Raises:
        ConfigError: an argument is not valid, or the student cannot be used.
        DataError: a line is not a question, or more than `max_skip_fraction` of the images cannot be read.
        Stopped: a signal ended it.
    """
    with stop_signals() as signals, joined_ranks() as store:
        with distributed.raise_on_all_ranks():
            if output.exists():
                raise ConfigError(f"--output {output} already exists; choose a new file")
            if not output.absolute().parent.is_dir():
                raise ConfigError(f"--output {output}: the folder {output.absolute().parent} does not exist")
            file = QuestionFile(questions)
            source = export.find_export(run)
        source = Path(distributed.broadcast_from_main(str(source)))
        with distributed.raise_on_all_ranks():
            student, tokenizer, collator = open_student(source, base, file.max_images, max_length, [decoding.method])
            decoding = decoding.prepare(student, collator)
            settings = {**describe_answering(student, collator, batch_size, decoding), **describe_weights(source)}
        work = Work("generate", [file], [len(file)], batch_size, max_skip_fraction, signals)
        ask = partial(predict, student, tokenizer, collator, decoding=decoding, device=distributed.device())
        tally, journal = answer_all(
            work, output, {**settings, "questions": file.sha256, "versions": versions()}, ask, store
        )
        with distributed.raise_on_all_ranks():
            if distributed.is_main():
                tally.warn(collator.encoder.max_length, decoding.max_new_tokens)
                write_text(output, _format(tally.rows, file.with_reference))
                journal.finish()
    return output


def _format(rows: Sequence[Prediction], with_reference: set[str]) -> str:
    """Return the lines of the predictions, without the placeholder of an answer that the questions do not have."""
    lines = [json.loads(format_prediction(row)) for row in rows]
    for line in lines:
        if line["key"] not in with_reference:
            del line["answer"]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
