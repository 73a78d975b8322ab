"""Measures what a student's attention shows: against boxes and masks, by block and head, and by removing patches."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medalign import distributed
from medalign.checkpoint import export
from medalign.contracts import IGNORE, Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.reader import prepare
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.decoding.base import Decoding
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generation import Answer, digest, generate_answers
from medalign.evaluation.ground_records import KINDS, Grounded, head_shares, summarize
from medalign.evaluation.ground_table import heads_csv
from medalign.evaluation.metrics.predictions import rounded
from medalign.evaluation.overlap import Region
from medalign.evaluation.patch_removal import curves
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluator import evaluation_folder
from medalign.file_lock import only_writer
from medalign.geometry import CanvasFrame, PatchGrid
from medalign.inference import open_student
from medalign.observability.files import write_text
from medalign.observability.progress import ProgressReporter
from medalign.run_folder import EvaluationFolder
from medalign.student.head_maps import head_maps
from medalign.student.model import Student

log = logging.getLogger("medalign")

_NO_TEXT = "-"  # in the place of an answer without text: the question's maps do not depend on it
Found = tuple[Sample, Region, list[float] | None, Prepared]  # a sample, its boxes, its mask on the grid, its question


@dataclass(frozen=True)
class Instruments:
    """A student with what is needed to question it about its own answers."""

    student: Student
    tokenizer: Any
    questions: Collator  # padded on the left
    answers: Collator  # padded on the right, with answers
    decoding: Decoding
    steps: int
    batch_size: int

    def measure(self, found: Sequence[Found]) -> list[Grounded]:
        """Measure a batch of samples."""
        device, samples = distributed.device(), [sample for sample, *_ in found]
        given = generate_answers(
            self.student,
            self.tokenizer,
            self.questions.join([question for *_, question in found]).to(device),
            self.decoding,
        )
        given, prepared = zip(*map(self._with_answer, samples, given), strict=True)
        batch = self.answers.join(prepared).to(device)
        predicting = torch.zeros_like(batch.question_mask)
        predicting[:, :-1] = batch.labels[:, 1:] != IGNORE
        first = [batch.image_sample.tolist().index(row) for row in range(len(samples))]
        maps = {
            kind: [block[first].cpu().double().numpy() for block in blocks]
            for kind, blocks in zip(KINDS, head_maps(self.student, batch, [batch.rows, predicting]), strict=True)
        }
        return [
            self._record(one, text, part, {kind: [block[row] for block in maps[kind]] for kind in KINDS})
            for row, (one, text, part) in enumerate(zip(found, given, prepared, strict=True))
        ]

    def _with_answer(self, sample: Sample, given: Answer) -> tuple[Answer, Prepared]:
        """Prepare a sample with its own answer. One that the template cannot hold counts as an answer without text."""
        try:
            return given, prepare(self.answers, replace(sample, answer=given.text or _NO_TEXT))
        except BadSample as error:
            log.warning("an answer has no maps: %s", error)
            return replace(given, text=""), prepare(self.answers, replace(sample, answer=_NO_TEXT))

    def _record(
        self, found: Found, given: Answer, prepared: Prepared, maps: Mapping[str, Sequence[np.ndarray]]
    ) -> Grounded:
        """Return the measurements of a sample, given the maps [N, H] of its blocks, and measure the removal."""
        sample, region, mask, _ = found
        kinds = KINDS if given.text else KINDS[:1]
        tapped = {kind: maps[kind][self.student.layer].mean(-1) for kind in kinds}
        shares = {kind: [head_shares(map_NH, region) for map_NH in maps[kind]] for kind in kinds}
        removal = None
        if given.text:
            removed = curves(
                self.student,
                self.answers,
                prepared,
                tapped["question"],
                steps=self.steps,
                batch_size=self.batch_size,
                device=distributed.device(),
            )
            removal = asdict(removed)
        return Grounded(
            key=sample.key,
            image=digest(sample.images),
            image_size=sample.images[0].size,
            boxes=[list(box) for box in sample.boxes],
            mask=mask,
            maps={kind: rounded(map_N.tolist()) for kind, map_N in tapped.items()},
            inside={kind: [rounded(inside) for inside, _ in found] for kind, found in shares.items()},
            on_image={kind: [rounded(total) for _, total in found] for kind, found in shares.items()},
            removal=removal,
        )


def ground(
    run: Path,
    data: str,
    *,
    name: str | None = None,
    limit: int | None = None,
    steps: int = 8,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    base: str | None = None,
    command: str | None = None,
) -> Path:
    """Measure the attention of a run on the samples of a shard folder that have boxes.

    One line per sample is written as soon as its batch is measured. The same call continues after an interruption, and
    with a larger limit.

    Args:
        run: a run, a checkpoint or an export.
        data: a folder of shards.
        name: name of the evaluation that the results belong to; by default that of the shard folder.
        limit: measure only the first samples that have boxes.
        steps: points of the curves of deletion and insertion, less one.
        batch_size: samples, or images with removed patches, per forward pass.
        max_new_tokens: limit of an answer, which is greedy.
        base: folder of the base model, if it has moved since the training.
        command: the command line, for the result.

    Returns:
        The file of the result.

    Raises:
        ConfigError: an argument is not valid, or several ranks call it.
        DataError: no sample has boxes inside its image.
    """
    if distributed.world_size() > 1:
        raise ConfigError("medalign ground runs in one process, not on several ranks; start it without a launcher")
    folder, index = EvaluationFolder(evaluation_folder(run, [data], name)), ShardIndex.open(data)
    source = export.find_export(run)
    student, tokenizer, questions = open_student(source, base, index.max_images)
    decoding = Decoding(max_new_tokens=max_new_tokens)
    instruments = Instruments(student, tokenizer, questions, _with_answers(questions), decoding, steps, batch_size)
    facts = {
        "grid": [student.spec.grid.rows, student.spec.grid.columns],
        "layer": student.layer,
        "steps": steps,
        "max_new_tokens": max_new_tokens,
        **describe_weights(source),
        "shards": list(index.fingerprint()),
        "versions": versions(),
    }
    with only_writer(folder.grounding_samples, "--name"):
        records, unreadable = _measure_all(instruments, index, folder.grounding_samples, facts, limit)
        if not records:
            raise DataError(f"no sample of --data {data} has boxes inside its image; name shards with boxes")
        summary = summarize(records, student.spec.grid)
        whole = {**summary, "unreadable": unreadable, "limit": limit, "command": command, "provenance": facts}
        write_text(folder.grounding_heads, heads_csv(summary))
        write_text(folder.grounding, json.dumps(whole, indent=2) + "\n")
    return folder.grounding


def _with_answers(questions: Collator) -> Collator:
    """Return the collator of the same samples with answers, padded on the right."""
    answers = copy.copy(questions)
    answers.padding_side, answers.with_answer = "right", True
    return answers


def _measure_all(
    instruments: Instruments, index: ShardIndex, output: Path, facts: Mapping[str, Any], limit: int | None
) -> tuple[list[Grounded], int]:
    """Measure the samples that the file lacks. Returns all records and how many samples could not be read."""
    head, records = _resume(output, facts)
    if records:
        log.info("%d samples are in %s already", len(records), output)
    boxed = _Boxed(index, instruments.questions, instruments.student.spec.grid)
    done = {one.key for one in records}
    left = (found for found in islice(boxed, limit) if found[0].key not in done)
    with ProgressReporter("ground", len(index) if limit is None else limit, "samples") as progress:
        while batch := list(islice(left, instruments.batch_size)):
            found = instruments.measure(batch)
            if head is not None:  # a file of other shards is replaced only when there is something in its place
                write_text(output, head)
                head = None
            with output.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(one)) + "\n" for one in found))
            records += found
            progress.reach(boxed.examined if limit is None else boxed.found)
        progress.reach(boxed.examined if limit is None else boxed.found)
    return records[:limit], boxed.unreadable


class _Boxed:
    """The samples whose boxes cover a part of their image and whose questions can be asked, read one by one.

    Attributes:
        examined: number of samples read so far.
        found: how many of these are yielded.
        unreadable: how many of these cannot be read or asked.
    """

    def __init__(self, index: ShardIndex, questions: Collator, grid: PatchGrid) -> None:
        self._index, self._questions, self._grid = index, questions, grid
        self.examined = self.found = self.unreadable = 0

    def __iter__(self) -> Iterator[Found]:
        for place in range(len(self._index)):
            self.examined += 1
            try:
                sample, mask = self._index.read(place), self._index.read_mask(place)
                question = prepare(self._questions, sample) if sample.boxes else None
            except BadSample as error:
                log.warning("bad sample skipped: %s", error)
                self.unreadable += 1
                continue
            if question is None:
                continue
            region = Region.of_boxes(sample.boxes, CanvasFrame(*sample.images[0].size), self._grid)
            if region.inside_N.any():
                masked = None if mask is None else Region.of_mask(mask, self._grid).inside_N
                self.found += 1
                shown = None if masked is None or not masked.any() else rounded(masked.tolist())
                yield sample, region, shown, question


def _resume(path: Path, facts: Mapping[str, Any]) -> tuple[str | None, list[Grounded]]:
    """Return what a new file begins with, None for one with the same facts, and its samples; keep its whole lines."""
    head = json.dumps({"facts": facts}) + "\n"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    if lines and lines[0] + "\n" != head:
        log.warning("%s was measured with other settings, weights, shards or versions; starting again", path)
        lines = []
    if not lines:
        return head, []
    try:
        records = [Grounded.of(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and its samples are measured again") from error
    write_text(path, head + "".join(line + "\n" for line in lines[1:]))
    return None, records
