"""The gallery of a report: truth, the teacher's map, and the answer and attention of every arm, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from medalign.contracts import Sample
from medalign.data.shards.index import ShardIndex
from medalign.errors import CheckpointError, ConfigError, DataError
from medalign.evaluation.grounding import Grounding, grounding
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.scores import correctness
from medalign.evaluation.report.gallery import Choice, Chosen, Kind, choose
from medalign.evaluation.report.origin import distils
from medalign.evaluation.report.pictures import draw_boxes, overlay
from medalign.evaluation.report.runs import Arm, Evaluation
from medalign.geometry import CanvasFrame, PatchGrid
from medalign.run_folder import EvaluationFolder

MAX_SIDE = 448  # pixels of the longer side of an image in the report
QUALITY = 80  # of WebP

# Of the samples of a run: its teacher's attention to the first image of each, on a grid.
TeacherMaps: TypeAlias = Callable[[Path, Sequence[Sample], PatchGrid], list[np.ndarray]]


@dataclass(frozen=True)
class Answered:
    """The answer of one arm."""

    arm: Arm
    row: Prediction
    correctness: float  # in [0, 1]
    errs: bool  # whether it has the error that the example shows
    picture: str  # data URI of the overlay; "" if there is none


@dataclass(frozen=True)
class Taught:
    """The teacher's map of an image."""

    picture: str  # data URI of the overlay
    grounding: Grounding | None  # None without boxes


@dataclass(frozen=True)
class Example:
    """One question with its reference and the answers of all arms."""

    asked: Prediction
    kind: Kind
    picture: str  # data URI of the first image with its boxes; "" if there is none
    images: int  # number of images of the sample; 0 if they could not be read
    taught: Taught | None
    answers: list[Answered]


@dataclass(frozen=True)
class Examples:
    """The examples of one data set.

    Attributes:
        name: the data set.
        arms: the arms that were evaluated on it.
        items: the examples, sorted by kind.
        counts: how many questions of each kind there are.
        teacher: the arm whose teacher is shown; "" without one.
        problems: why images or the teacher's maps are missing.
    """

    name: str
    arms: list[Arm]
    items: list[Example]
    counts: dict[Kind, int]
    teacher: str
    problems: list[str]


def find_examples(arms: Sequence[Arm], name: str, count: int, teacher_maps: TeacherMaps | None = None) -> Examples:
    """Choose questions and draw their pictures. Of an arm with several seeds, the first one is shown.

    If the shards do not exist any more, or contain another sample with the same key, the examples have no images and
    `problems` gives the reason.

    Args:
        arms: the arms of the report.
        name: the data set.
        count: examples of each kind.
        teacher_maps: computes the maps of a run's teacher; None shows none.
    """
    scored = [arm for arm in arms if arm.evaluations(name)]
    evaluations = [arm.evaluations(name)[0] for arm in scored]
    choice, problems = choose(evaluations, count), []
    samples: dict[str, Sample] = {}
    try:
        samples = _read_samples(evaluations[0], choice)
    except (DataError, OSError) as error:
        problems.append(f"The images could not be read from the shards: {error}")
    taught: dict[str, np.ndarray] = {}
    teaching = next((arm for arm in scored if distils(arm.runs[0].config)), None)
    if teacher_maps is not None and teaching is not None and samples:
        try:
            taught = _teach(teacher_maps, teaching, samples, evaluations[0])
        except (CheckpointError, ConfigError, DataError, OSError) as error:
            problems.append(f"The teacher's maps are not shown: {error}")
    items = [_example(item, scored, evaluations, samples.get(item.key), taught.get(item.key)) for item in choice.items]
    return Examples(name, scored, items, choice.counts, teaching.title if teaching and taught else "", problems)


def _read_samples(evaluation: Evaluation, choice: Choice) -> dict[str, Sample]:
    """Read the chosen samples that have images, and check that they are those that were evaluated."""
    if choice.items and not evaluation.data:
        raise DataError(f"{EvaluationFolder(evaluation.folder).scores} does not contain the folders of the shards")
    opened = cache(ShardIndex.open)
    found = {}
    for key in (item.key for item in choice.items):
        row = evaluation.predictions[key]
        index = opened(evaluation.data[row.folder])
        sample = index.read(index.index_of_key(row.key))
        if sample.question != row.question or (
            row.image_size and sample.images and sample.images[0].size != row.image_size
        ):
            raise DataError(f"sample {key!r} of {', '.join(evaluation.data)} is not the one that was evaluated")
        if sample.images:
            found[key] = sample
    return found


def _teach(
    teacher_maps: TeacherMaps, arm: Arm, samples: dict[str, Sample], evaluation: Evaluation
) -> dict[str, np.ndarray]:
    if evaluation.grid is None:
        raise DataError(f"{EvaluationFolder(evaluation.folder).scores} does not contain the student's grid")
    return dict(zip(samples, teacher_maps(arm.runs[0].path, list(samples.values()), evaluation.grid), strict=True))


def _example(
    item: Chosen,
    arms: Sequence[Arm],
    evaluations: Sequence[Evaluation],
    sample: Sample | None,
    taught_N: np.ndarray | None,
) -> Example:
    asked = evaluations[0].predictions[item.key]
    image = sample.images[0] if sample else None
    answers = []
    for arm, evaluation, errs in zip(arms, evaluations, item.errs, strict=True):
        row, grid, picture = evaluation.predictions[item.key], evaluation.grid, ""
        if image is not None and row.attention and grid is not None and len(row.attention) == grid.size:
            picture = _uri(overlay(image, row.attention, grid, row.boxes))
        answers.append(Answered(arm, row, correctness(row), errs, picture))
    taught = None
    if image is not None and taught_N is not None and (grid := evaluations[0].grid) is not None:
        found = grounding(taught_N, asked.boxes, CanvasFrame(*image.size), grid) if asked.boxes else None
        taught = Taught(_uri(overlay(image, taught_N, grid, asked.boxes)), found)
    truth = _uri(draw_boxes(image, asked.boxes)) if image is not None else ""
    return Example(asked, item.kind, truth, len(sample.images) if sample else 0, taught, answers)


def _uri(picture: Image.Image) -> str:
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
