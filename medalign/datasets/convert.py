"""A data set's folder to shards: listed, cut into parts, converted by processes, joined split by split.

    OUTPUT/SPLIT/              the shards of each split, which appear whole or not at all
    OUTPUT/conversion.json     what was written, what was skipped and why, name by name,
                               and of which pictures only the first of several frames was taken
    OUTPUT/.conversion/        while it runs: the finished parts of this conversion

The shards depend on the input and the settings alone: each part of `samples_per_shard` listed samples is one shard,
whatever process made it and when. After an interruption the same command goes on with the parts that are missing; with
other settings, or after the annotations changed, it begins again. A part is finished when its account is on disk,
which is written after its shards.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import hmac
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from medalign import __version__
from medalign.data.samples.sample import BadSample
from medalign.data.shards.listing import INDEX_NAME
from medalign.data.shards.records import Refused
from medalign.data.shards.writer import require_replaceable
from medalign.datasets.annotations import check_depth
from medalign.datasets.base import Chosen, DatasetConverter, Item
from medalign.datasets.hashing import Hashing
from medalign.datasets.parts import Part, convert_part, generalize, join_parts
from medalign.datasets.pool import in_processes
from medalign.datasets.report import ConversionReport, Skipped
from medalign.errors import DataError, plain

REPORT_NAME = "conversion.json"
_WORK = ".conversion"
_FORMAT = 2  # of the parts' accounts; a conversion that was interrupted under another one begins again
_LOCK, _FINGERPRINT = ".lock", ".fingerprint"  # in it, beside the splits, whose names begin with no point


def convert(
    source: DatasetConverter,
    input: Path,
    output: Path,
    *,
    chosen: Chosen | None = None,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    hashing: Hashing | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ConversionReport:
    """Convert and return the account of it.

    Args:
        chosen: settings of the source that differ from its defaults, by name with underscores.
        workers: processes; None takes one a core, at most 8. One part alone is converted in this process.
        progress: called now and then with the samples done and the samples of all.

    Raises DataError for a folder that lacks something, for no valid sample, and where the output cannot be written.
    """
    settings = {**source.defaults(), **(chosen or {})}
    input, output = Path(input), Path(output).absolute()
    _check_layout(source, input, settings)
    listed, skipped = _list(source, input, settings)
    account = ConversionReport(source.name, settings, _hashed(skipped, hashing))
    if not listed:
        _raise_nothing_listed(input, output, account)
    _require_place(output, listed)
    fingerprint = _fingerprint(source, settings, samples_per_shard, hashing, listed)
    try:
        with _work_folder(output / _WORK, fingerprint) as work:
            _clear_remains(output, listed)
            parts = [
                Part(source.name, input, settings, hashing, split, chunk, work / split / f"part-{number:06d}")
                for split, items in listed.items()
                for number, chunk in enumerate(_chunks(items, samples_per_shard))
            ]
            _run(parts, workers, progress)
            _put_in_place(parts, output, work, account)
        account.write(output / REPORT_NAME)
        shutil.rmtree(output / _WORK)
    except OSError as error:
        raise DataError(f"converting into {output} stopped: {error}; the same command goes on from there") from error
    if not account.written:
        reasons = account.summary() + account.first()
        raise DataError(f"no sample of {input} could be used; {output / REPORT_NAME} says why: {reasons}")
    return account


def _raise_nothing_listed(input: Path, output: Path, account: ConversionReport) -> NoReturn:
    """Raises DataError with the first reason, after the file that names them all is written, where it can be."""
    if not account.skipped:
        raise DataError(f"{input} lists no sample; its annotations are empty")
    message = f"{input} lists no sample that can be used ({account.summary()}{account.first()})"
    try:
        output.mkdir(parents=True, exist_ok=True)
        account.write(output / REPORT_NAME)
    except OSError as error:
        raise DataError(
            f"{message}; the reasons cannot be written to {output / REPORT_NAME}: {plain(error)}"
        ) from error
    raise DataError(f"{message}; {output / REPORT_NAME} names each")


def _run(parts: Sequence[Part], workers: int | None, progress: Callable[[int, int], object] | None) -> None:
    """Convert the parts that are not finished yet."""
    waiting = [part for part in parts if not part.account.exists()]
    total = sum(len(part.items) for part in parts)
    finished = total - sum(len(part.items) for part in waiting)
    if progress:
        progress(finished, total)
    in_processes(convert_part, waiting, workers, progress and (lambda done: progress(finished + done, total)))


def _put_in_place(parts: Sequence[Part], output: Path, work: Path, account: ConversionReport) -> None:
    """Join the parts of each split in its folder, and enter it in the account."""
    for split in dict.fromkeys(part.split for part in parts):
        mine = [part for part in parts if part.split == split]
        account.add(split, join_parts(mine, output / split, work / f"{split}.joined"))
    for split, report in account.splits.items():
        if account.written and not report.written:
            shutil.rmtree(output / split, ignore_errors=True)  # what an earlier conversion had in it


def _check_layout(source: DatasetConverter, input: Path, settings: Chosen) -> None:
    if not input.is_dir():
        raise DataError(f"{input} is no folder; {source.name} needs:\n{source.layout}")
    missing = source.validate_layout(input, settings)
    if missing:
        lines = "\n".join(f"  {line}" for line in missing)
        where = f"\nget the data set under its name: {source.public_name}" if source.public_name else ""
        raise DataError(f"{input} is not a whole folder of {source.title}; it lacks\n{lines}{where}")


def _require_place(output: Path, splits: Collection[str]) -> None:
    """Raises DataError where the splits cannot be put, or would stand beside one of another conversion."""
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise DataError(f"{there} is a file, so no folder can be made at {output}; name another output")
    for split in splits:
        require_replaceable(output / split)
    for index in sorted(output.glob(f"*/{INDEX_NAME}")):
        if index.parent.name not in splits:
            raise DataError(
                f"{index.parent} is a split that this conversion does not write, and may share samples with what it "
                "writes; remove it, or name another output"
            )


def _list(source: DatasetConverter, input: Path, settings: Chosen) -> tuple[dict[str, list[Item]], list[Skipped]]:
    listed: dict[str, list[Item]] = {}
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for item in _items(source, input, settings):
        if isinstance(item, Refused):
            skipped.append(Skipped(item.name, item.reason))
        elif item.key in seen:
            skipped.append(Skipped(item.key, "key occurs a second time; keys must be unique"))
        else:
            try:
                check_depth(item.data)
            except BadSample as error:
                skipped.append(Skipped(item.key, str(error)))
                continue
            seen.add(item.key)
            listed.setdefault(item.split, []).append(item)
    return listed, skipped


def _items(source: DatasetConverter, input: Path, settings: Chosen) -> Iterator[Item | Refused]:
    try:
        yield from source.iter_items(input, settings)
    except OSError as error:
        raise DataError(f"{input} cannot be listed: {plain(error)}") from error


def _clear_remains(output: Path, splits: Iterable[str]) -> None:
    """Remove what a killed command may have left beside the splits; the lock says that none is at work now."""
    for split in splits:
        for remains in ("partial", "old"):
            for path in output.glob(f".{glob.escape(split)}.{remains}-*"):
                shutil.rmtree(path)


def _chunks(items: Sequence[Item], size: int) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def _hashed(skipped: Sequence[Skipped], hashing: Hashing | None) -> list[Skipped]:
    named = [Skipped(hashing.name(one.key), one.reason) for one in skipped] if hashing else skipped
    return generalize(named, hashing)


def _fingerprint(
    source: DatasetConverter, settings: Chosen, size: int, hashing: Hashing | None, listed: dict[str, list[Item]]
) -> str:
    salt = hmac.new(hashing.salt, b"fingerprint", hashlib.sha256).hexdigest() if hashing else ""
    fields = sorted(hashing.fields) if hashing else []
    made_by = [__version__, _FORMAT, source.name, settings, size, salt, fields]
    digest = hashlib.sha256(json.dumps(made_by, default=str).encode())
    for items in listed.values():
        for item in items:
            digest.update(json.dumps([item.split, item.key, item.data], sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def _work_folder(path: Path, fingerprint: str) -> Iterator[Path]:
    """The folder of this conversion's parts, cleared if another conversion left it, and locked while in use."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another conversion is writing to {path.parent}; wait for it to end") from error
        known = path / _FINGERPRINT
        if not known.exists() or known.read_text(encoding="utf-8") != fingerprint:
            for old in path.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != _LOCK:
                    old.unlink()
            known.write_text(fingerprint, encoding="utf-8")
        yield path
