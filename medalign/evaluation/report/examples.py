"""Example questions with the answers of all runs, the image, and the question's attention to it in each run."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from medalign.data.shards.index import ShardIndex
from medalign.errors import DataError
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.scores import correctness
from medalign.evaluation.report.pictures import draw_boxes, overlay
from medalign.evaluation.report.runs import Evaluation, RunRecord
from medalign.run_folder import EvaluationFolder

MAX_SIDE = 512  # pixels of the longer side of an image in the report


@dataclass(frozen=True)
class Answered:
    """The answer of one run."""

    run: RunRecord
    row: Prediction
    correctness: float  # in [0, 1]
    picture: str  # data URI of the overlay; "" if there is none


@dataclass(frozen=True)
class Example:
    """One question with its reference and the answers of all runs."""

    asked: Prediction
    picture: str  # data URI of the first image with its boxes; "" if there is none
    images: int  # number of images of the sample; 0 if they could not be read
    answers: list[Answered]


@dataclass(frozen=True)
class Examples:
    """The examples of one data set, and why images are missing, if any are."""

    name: str
    items: list[Example]
    problem: str


def examples(runs: Sequence[RunRecord], name: str, count: int) -> Examples:
    """Select questions that every run answered, spread evenly over the data set and independent of the scores.

    Questions with boxes and attention are preferred. If the shards do not exist any more, or contain another sample
    with the same key, the examples have no images and `problem` gives the reason.

    Args:
        runs: the runs.
        name: the data set.
        count: maximum number of examples.
    """
    scored = [(run, run.evaluations[name]) for run in runs if name in run.evaluations]
    keys = _spread(_candidates([evaluation for _, evaluation in scored]), count)
    first = scored[0][1]
    problem = ""
    pictures: dict[str, tuple[Image.Image, int]] = {}
    try:
        if keys:
            pictures = _pictures(first, keys)
    except (DataError, OSError) as error:
        problem = f"The images could not be read from the shards: {error}"
    return Examples(name, [_example(scored, key, *pictures.get(key, (None, 0))) for key in keys], problem)


def _candidates(evaluations: Sequence[Evaluation]) -> list[str]:
    first, *others = (evaluation.predictions for evaluation in evaluations)
    shared = [key for key in first if all(key in other for other in others)]
    with_attention = [key for key in shared if all(e.predictions[key].attention for e in evaluations)]
    with_boxes = [key for key in with_attention if first[key].boxes]
    return with_boxes or with_attention or shared


def _spread(keys: Sequence[str], count: int) -> list[str]:
    count = min(count, len(keys))
    return [keys[(2 * i + 1) * len(keys) // (2 * count)] for i in range(count)]


def _pictures(evaluation: Evaluation, keys: Sequence[str]) -> dict[str, tuple[Image.Image, int]]:
    """Read the first image of each sample, to which boxes and attention refer, and the sample's number of images."""
    if not evaluation.data:
        raise DataError(f"{EvaluationFolder(evaluation.folder).scores} does not contain the folders of the shards")
    opened = cache(ShardIndex.open)
    found = {}
    for key in keys:
        row = evaluation.predictions[key]
        index = opened(evaluation.data[row.folder])
        sample = index.read(index.index_of_key(row.key))
        if sample.question != row.question or (
            row.image_size and sample.images and sample.images[0].size != row.image_size
        ):
            raise DataError(f"sample {key!r} of {', '.join(evaluation.data)} is not the one that was evaluated")
        if sample.images:
            found[key] = sample.images[0], len(sample.images)
    return found


def _example(
    scored: Sequence[tuple[RunRecord, Evaluation]], key: str, image: Image.Image | None, images: int
) -> Example:
    asked = scored[0][1].predictions[key]
    answers = []
    for run, evaluation in scored:
        row, grid, picture = evaluation.predictions[key], evaluation.grid, ""
        if image is not None and row.attention and grid is not None and len(row.attention) == grid.size:
            picture = _uri(overlay(image, row.attention, grid, row.boxes))
        answers.append(Answered(run, row, correctness(row), picture))
    return Example(asked, _uri(draw_boxes(image, asked.boxes)) if image is not None else "", images, answers)


def _uri(picture: Image.Image) -> str:
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
