"""Evaluates a trained student on shards: answers, scores, and what is needed to repeat them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from medalign import distributed
from medalign.checkpoint import export
from medalign.data.shards.index import ShardIndex
from medalign.data.storage.byte_ranges import is_remote
from medalign.errors import ConfigError
from medalign.evaluation.generation import PredictionBatch, predict
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluation.scores_file import format_scores, require_no_longer
from medalign.evaluation.tally import Tally
from medalign.evaluation.unfinished import UnfinishedEvaluation
from medalign.inference import open_student
from medalign.observability.files import write_text
from medalign.observability.progress import ProgressReporter
from medalign.run_folder import EvaluationFolder, find_run
from medalign.stop_signals import StopSignals, stop_signals
from medalign.student.decoding import Decoding

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
        decoding: greedy, beams or sampling, and the limit of an answer.
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
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        **asdict(decoding),
        "max_length": collator.encoder.max_length,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": distributed.device().type,
    }
    origin = {**describe_weights(export.find_export(run)), "shards": [list(index.fingerprint()) for index in indexes]}
    unfinished = UnfinishedEvaluation(folder.predictions, {**settings, **origin, "versions": versions()})
    done = unfinished.resume(indexes, planned, batch_size)
    tally = Tally(max_skip_fraction, list(done.rows), done.unreadable)
    ask = partial(predict, student, tokenizer, collator=collator, device=distributed.device())
    ask = partial(ask, batch_size=batch_size, decoding=decoding)
    with stop_signals() as signals:
        unfinished.append(_rows(ask, indexes, done.starts, planned, tally, signals))
    tally.warn(collator.encoder.max_length, decoding.max_new_tokens)
    provenance = {**origin, "settings": settings, "command": command, "versions": versions()}
    facts = {
        "name": folder.path.name,
        "data": [place if is_remote(place) else str(Path(place).resolve()) for place in data],
        "grid": [student.spec.grid.rows, student.spec.grid.columns],
        "samples": sum(map(len, indexes)),
        **settings,
        **tally.counts(),
        "provenance": provenance,
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
