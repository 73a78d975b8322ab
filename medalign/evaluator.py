"""Evaluates a trained student on shards: answers, scores, and what is needed to repeat them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from medalign import distributed
from medalign.answering import Work, answer_all, describe_answering
from medalign.checkpoint import export
from medalign.data.shards.index import ShardIndex
from medalign.data.storage.byte_ranges import is_remote
from medalign.decoding.base import Decoding, Greedy
from medalign.errors import ConfigError
from medalign.evaluation.generation import predict
from medalign.evaluation.metrics import write_predictions
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluation.scores_file import format_scores, read_scores, require_no_longer
from medalign.evaluation.tally import Tally
from medalign.inference import open_student
from medalign.observability.files import write_text
from medalign.probing import Asking, ask_probes, remove_probes
from medalign.run_folder import EvaluationFolder, find_run
from medalign.stop_signals import stop_signals
from medalign.work_queue import joined_ranks

log = logging.getLogger("medalign")

_GREEDY = Decoding()


def evaluate(
    run: Path,
    data: Sequence[str],
    *,
    name: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    decoding: Decoding = _GREEDY,
    max_length: int | None = None,
    max_skip_fraction: float = 0.01,
    base: str | None = None,
    overwrite: bool = False,
    probes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Evaluate a run on shards. Under a launcher (`deepspeed`, `srun`) every rank must call it, and answers a share.

    If it ends early, the answers so far remain in hidden files that the log names, and the same call resumes it, also
    on another number of ranks. USR1 and TERM end it after the current batches.

    Args:
        run: a run, a checkpoint or an export.
        data: shard folders.
        name: name of the evaluation; by default that of the first shard folder. With another method than greedy, the
            name of the method is added to it: NAME-METHOD.
        batch_size: questions per batch.
        limit: evaluate only the first samples.
        decoding: the method, beams or sampling, and the limit of an answer.
        max_length: limit of a question and one image, in tokens; by default that of the training.
        max_skip_fraction: fraction of the samples that may be unreadable.
        base: folder of the base model, if it has moved since the training.
        overwrite: whether an evaluation of more samples with the same name may be replaced.
        probes: names in `evaluation.probes.catalog`, asked after the answers. An evaluation that was finished with the
            same settings, weights, shards and versions is kept, and only the probes are asked.
        command: the command line, for scores.json.

    Returns:
        The folder that contains predictions.jsonl and scores.json.

    Raises:
        ConfigError: an argument is not valid, the student cannot be used, or an evaluation of more samples would be
            replaced.
        DataError: more than `max_skip_fraction` of the samples cannot be read.
        Stopped: a signal ended it.
    """
    (folder,) = evaluate_each(
        run,
        data,
        [decoding],
        name=name,
        batch_size=batch_size,
        limit=limit,
        max_length=max_length,
        max_skip_fraction=max_skip_fraction,
        base=base,
        overwrite=overwrite,
        probes=probes,
        command=command,
    )
    return folder


def evaluate_each(
    run: Path,
    data: Sequence[str],
    decodings: Sequence[Decoding],
    *,
    name: str | None,
    batch_size: int,
    limit: int | None,
    max_length: int | None,
    max_skip_fraction: float,
    base: str | None,
    overwrite: bool,
    probes: Sequence[str] = (),
    command: str | None = None,
) -> list[Path]:
    """Evaluate a run with several methods of decoding; see `evaluate`. The student is loaded once.

    Args:
        run: a run, a checkpoint or an export.
        data: shard folders.
        decodings: with different methods. If there are several, an evaluation that was finished with the same settings,
            weights, shards and versions is kept as it is, so an interrupted call continues with the others.
        name: see `evaluate`.
        batch_size: questions per batch.
        limit: evaluate only the first samples.
        max_length: see `evaluate`.
        max_skip_fraction: fraction of the samples that may be unreadable.
        base: folder of the base model, if it has moved since the training.
        overwrite: repeat finished evaluations, and replace evaluations of more samples.
        probes: see `evaluate`.
        command: the command line, for scores.json.

    Returns:
        The folder of each evaluation.
    """
    with stop_signals() as signals, joined_ranks() as store:
        with distributed.raise_on_all_ranks():
            folders = [EvaluationFolder(evaluation_folder(run, data, name, one.method.name)) for one in decodings]
            indexes = _open(data)
            planned = _planned(indexes, limit)
            if not overwrite:
                for folder in folders:
                    require_no_longer(folder, sum(planned))
            source = export.find_export(run)
        source = Path(distributed.broadcast_from_main(str(source)))  # a training may write another one meanwhile
        with distributed.raise_on_all_ranks():
            most, methods = max(index.max_images for index in indexes), [one.method for one in decodings]
            student, tokenizer, collator = open_student(source, base, most, max_length, methods)
            decodings = [decoding.prepare(student, collator) for decoding in decodings]
            _require_other_shards(decodings, data, indexes)
            origin = {**describe_weights(source), "shards": [list(index.fingerprint()) for index in indexes]}
        places = [place if is_remote(place) else str(Path(place).resolve()) for place in data]
        for folder, decoding in zip(folders, decodings, strict=True):
            more = folder != folders[-1]
            title = "evaluate" if len(folders) == 1 else f"evaluate {decoding.method.name}"
            work = Work(title, indexes, planned, batch_size, max_skip_fraction, signals, more or bool(probes))
            settings = {"limit": limit, **describe_answering(student, collator, batch_size, decoding)}
            ask = partial(predict, student, tokenizer, collator, decoding=decoding, device=distributed.device())
            known = {**settings, **origin, "versions": versions()}
            asking = Asking(work, indexes, known, ask, student.spec.grid, store)
            provenance = {**origin, "settings": settings, "versions": versions()}
            if (len(folders) > 1 or probes) and not overwrite and _is_finished(folder, provenance):
                log.info("%s is already evaluated; --overwrite repeats it", folder.path)
            else:
                _answer(folder, asking, settings | {"data": places, "provenance": provenance | {"command": command}})
            ask_probes(folder, probes, asking, more)
    return [folder.path for folder in folders]


def _answer(folder: EvaluationFolder, asking: Asking, facts: Mapping[str, Any]) -> None:
    """Answer the samples, and write the predictions and the scores. Every rank must call it."""
    tally, journal = answer_all(asking.work, folder.predictions, asking.settings, asking.ask, asking.store)
    found = {
        "name": folder.path.name,
        "grid": [asking.grid.rows, asking.grid.columns],
        "samples": sum(map(len, asking.indexes)),
    }
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            _write(folder, tally, {**found, **facts})
            journal.finish()


def _is_finished(folder: EvaluationFolder, provenance: Mapping[str, Any]) -> bool:
    """Return whether the evaluation was finished as it would be now. Every rank must call it, and rank 0 decides."""
    same = False
    with distributed.raise_on_all_ranks():
        if distributed.is_main() and folder.scores.is_file() and folder.predictions.is_file():
            before = read_scores(folder.scores).get("provenance")
            same = isinstance(before, dict) and before | {"command": None} == (
                json.loads(json.dumps(provenance)) | {"command": None}
            )
    return bool(json.loads(distributed.broadcast_from_main(json.dumps(same))))


def _write(folder: EvaluationFolder, tally: Tally, facts: Mapping[str, Any]) -> None:
    """Write the predictions and their scores, and log what was cut or is empty."""
    tally.warn(facts["max_length"], facts["max_new_tokens"])
    remove_probes(folder)
    write_predictions(folder.predictions, tally.rows)
    write_text(folder.scores, format_scores(tally.rows, {**facts, **tally.counts()}))


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


def _require_other_shards(decodings: Sequence[Decoding], data: Sequence[str], indexes: Sequence[ShardIndex]) -> None:
    for place, index in zip(data, indexes, strict=True):
        for method in (decoding.method for decoding in decodings):
            if set(method.learned_from) & set(index.fingerprint()):
                raise ConfigError(
                    f"--decoding {method.name} learns from samples that are evaluated: its shards are those of --data "
                    f"{place}; name others, such as the training set"
                )


def evaluation_folder(run: Path, data: Sequence[str], name: str | None, method: str = Greedy.name) -> Path:
    """Where an evaluation is written: by default it is called as the first folder of shards."""
    home, prefix = find_run(run)
    setting = f"--name {name!r}"
    if name is None:
        name, setting = _name_of(data[0]), f"no name can be derived from --data {data[0]}: --name"
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"{setting} must be the plain name of a folder in {home.evaluation_root}")
    suffix = "" if method == Greedy.name else f"-{method}"
    return home.evaluation(prefix + name + suffix).path


def _name_of(place: str) -> str:
    if not is_remote(place):
        return Path(os.path.abspath(place)).name
    address = urlsplit(place)
    return PurePosixPath(address.path).name or address.netloc
