"""Measures how well the visual tokens of findings separate from the rest of the image, at every block of a student."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medalign import distributed
from medalign.checkpoint import export
from medalign.data.batches.collator import Collator
from medalign.data.batches.reader import prepare
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generation import digest
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluation.regions import Film, Patches, choose_patches
from medalign.evaluation.separability import FOLDS, Labels, chance, embed, require_scikit_learn, separability
from medalign.evaluation.separability_picture import draw_tokens
from medalign.evaluator import evaluation_folder
from medalign.geometry import PatchGrid
from medalign.inference import open_student
from medalign.observability.files import write_text
from medalign.observability.progress import ProgressReporter
from medalign.run_folder import EvaluationFolder
from medalign.student.block_tokens import block_tokens
from medalign.student.model import Student

log = logging.getLogger("medalign")

INSIDE, OUTSIDE = "inside", "outside"
UNCLEAR = "several or unknown"  # in the picture, inside without one class
IN_PICTURE = 1000  # tokens of the picture


class Task(NamedTuple):
    """A classification: the chosen tokens that take part, and their labels."""

    tokens: np.ndarray  # int64
    labels: Labels


class Place(NamedTuple):
    """The input of a block, before W or after it."""

    block: int
    steered: bool


def measure_separability(
    run: Path,
    data: str,
    *,
    name: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    base: str | None = None,
    command: str | None = None,
) -> Path:
    """Measure the separability of the visual tokens of a run's student, and draw those of the tapped block.

    Args:
        run: a run, a checkpoint or an export.
        data: a folder of shards with boxes.
        name: name of the evaluation that the results belong to; by default that of the shard folder.
        limit: measure only the first images that have boxes.
        batch_size: images per forward pass.
        base: folder of the base model, if it has moved since the training.
        command: the command line, for the result.

    Returns:
        The file of the result. The picture is beside it.

    Raises:
        ConfigError: scikit-learn is not installed, or several ranks call it.
        DataError: too few images have boxes.
    """
    require_scikit_learn()
    if distributed.world_size() > 1:
        raise ConfigError("medalign separability runs in one process, not on ranks; start it without a launcher")
    folder, index = EvaluationFolder(evaluation_folder(run, [data], name)), ShardIndex.open(data)
    source = export.find_export(run)
    student, _, collator = open_student(source, base, index.max_images)
    chosen = [(film, choose_patches(film, student.spec.grid)) for film in _films(index, collator, limit)]
    chosen = [(film, patches) for film, patches in chosen if len(patches.places)]
    if len(chosen) < FOLDS:
        raise DataError(
            f"--data {data}: {len(chosen)} images have patches inside and outside of boxes, and {FOLDS} are needed; "
            "name shards with more boxes"
        )
    tasks = _tasks([patches for _, patches in chosen], student.spec.grid)
    tokens = _tokens(student, collator, index, chosen, batch_size)
    _draw(folder.separability_picture, student, tokens, tasks)
    found = {
        "images": len(chosen),
        "tokens": len(tasks["region"].tokens),
        "classes": {name: _counts(task.labels) for name, task in tasks.items()},
        "chance": {name: chance(task.labels) for name, task in tasks.items()},
        "blocks": [{**place._asdict(), **_scores(values_TD, tasks)} for place, values_TD in tokens.items()],
        "limit": limit,
        "command": command,
        "provenance": {**describe_weights(source), "shards": list(index.fingerprint()), "versions": versions()},
    }
    write_text(folder.separability, json.dumps(found, indent=2) + "\n")
    return folder.separability


def _films(index: ShardIndex, collator: Collator, limit: int | None) -> list[Film]:
    """Return the first images with boxes. All samples are read, since each may have boxes of any image."""
    films: dict[str, Film] = {}
    for place in range(len(index)):
        try:
            sample = index.read(place)
            if sample.boxes:
                prepare(collator, sample)
        except BadSample as error:
            log.warning("bad sample skipped: %s", error)
            continue
        if not sample.boxes:
            continue
        name = digest(sample.images[:1])
        if name in films or limit is None or len(films) < limit:
            films.setdefault(name, Film(place, sample.images[0].size)).add(sample)
    return list(films.values())


def _tasks(chosen: Sequence[Patches], grid: PatchGrid) -> dict[str, Task]:
    """Return the labels of the chosen tokens: inside or outside, and of those inside the finding if enough have one."""
    places = np.concatenate([patches.places for patches in chosen])
    inside = np.concatenate([patches.inside for patches in chosen])
    classes = np.concatenate([patches.classes for patches in chosen])
    images = np.repeat(np.arange(len(chosen)), [len(patches.places) for patches in chosen])
    rows_columns = np.stack(np.divmod(places, grid.columns), axis=1)
    named = np.flatnonzero(inside & (classes != ""))
    everything = np.arange(len(places))
    tasks = {"region": Task(everything, Labels(np.where(inside, INSIDE, OUTSIDE), images, rows_columns))}
    findings = Task(named, Labels(classes[named].astype(str), images[named], rows_columns[named]))
    return tasks | ({"finding": findings} if findings.labels.usable else {})


def _tokens(
    student: Student, collator: Collator, index: ShardIndex, chosen: Sequence[tuple[Film, Patches]], batch_size: int
) -> dict[Place, np.ndarray]:
    """Return the chosen tokens of all images at the input of each block, [T, D]."""
    found: defaultdict[Place, list[np.ndarray]] = defaultdict(list)
    with ProgressReporter("separability", len(chosen), "images") as progress:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            batch = collator([index.read(film.place) for film, _ in part]).to(distributed.device())
            owners = batch.image_sample.tolist()
            for block, steered, tokens_IND in block_tokens(student, batch):
                values_IND = tokens_IND.cpu().numpy()
                for row, (_, patches) in enumerate(part):
                    found[Place(block, steered)].append(values_IND[owners.index(row)][patches.places])
            progress.add(len(part))
    return {place: np.concatenate(parts) for place, parts in found.items()}


def _scores(values_TD: np.ndarray, tasks: Mapping[str, Task]) -> dict[str, Any]:
    return {name: separability(values_TD[task.tokens], task.labels) for name, task in tasks.items()}


def _counts(labels: Labels) -> dict[str, int]:
    return {name: int((labels.label_T == name).sum()) for name in labels.classes}


def _draw(path: Path, student: Student, tokens: Mapping[Place, np.ndarray], tasks: Mapping[str, Task]) -> None:
    """Draw the tokens at the input of the tapped block, before W and after it."""
    label_T = tasks["region"].labels.label_T.astype(object)
    if "finding" in tasks:
        label_T[label_T == INSIDE] = UNCLEAR
        label_T[tasks["finding"].tokens] = tasks["finding"].labels.label_T
    every = -(-len(label_T) // IN_PICTURE)
    titles = {False: "before W", True: "after W"}
    panels = [
        (f"block {place.block}, {titles[place.steered]}", embed(values_TD[::every]))
        for place, values_TD in tokens.items()
        if place.block == student.layer
    ]
    draw_tokens(panels, label_T[::every].astype(str), OUTSIDE, path)
