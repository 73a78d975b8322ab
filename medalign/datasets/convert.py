"""Convert the folder of a data set to shards: list samples, convert parts in several processes, join them per split.

    OUTPUT/SPLIT/              the shards of each split, which appear atomically
    OUTPUT/conversion.json     what was written, what was skipped and why, sample by sample,
                               and how many images had several frames, of which only the first is used
    OUTPUT/.conversion/        during the conversion: the finished parts

The shards depend only on the input and the settings: each part of `samples_per_shard` listed samples becomes one shard,
independent of the process that writes it. After an interruption, the same command continues with the missing parts. It
starts again if the folder, the settings or the annotations are others. A part is finished when its report is on disk,
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
from medalign.data.shards.output import require_replaceable
from medalign.data.shards.records import Refused
from medalign.datasets.annotations import check_depth
from medalign.datasets.base import DatasetConverter, Item, Settings
from medalign.datasets.hashing import Hashing
from medalign.datasets.parts import Part, convert_part, generalize, join_parts
from medalign.datasets.pool import run_in_processes
from medalign.datasets.report import ConversionReport, Skipped
from medalign.errors import DataError, format_os_error

REPORT_NAME = "conversion.json"
_WORK = ".conversion"
_FORMAT = 2  # of the reports of the parts; a conversion that was interrupted under another one starts again
_LOCK, _FINGERPRINT = ".lock", ".fingerprint"  # next to the folders of the splits, whose names do not begin with a dot


def convert(
    source: DatasetConverter,
    input: Path,
    output: Path,
    *,
    chosen: Settings | None = None,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    hashing: Hashing | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ConversionReport:
    """Convert a data set.

    Args:
        source: the converter.
        input: folder of the data set.
        output: folder for the shards.
        chosen: settings of the converter that differ from its defaults, by name with underscores.
        samples_per_shard: samples of each shard.
        workers: number of processes; None takes one per core, at most 8. A single part is converted in this process.
        hashing: how identifiers are hashed; None keeps them.
        progress: called regularly with the number of finished samples and the total.

    Returns:
        The report of the conversion.

    Raises:
        DataError: the input is incomplete, no sample is valid, or the output cannot be written.
    """
    settings = {**source.defaults(), **(chosen or {})}
    input, output = Path(input), Path(output).absolute()
    _check_layout(source, input, settings)
    listed, skipped = _list(source, input, settings)
    report = ConversionReport(source.name, settings, _hashed(skipped, hashing))
    if not listed:
        _raise_nothing_listed(input, output, report)
    _check_output(output, listed)
    fingerprint = _fingerprint(source, input, settings, samples_per_shard, hashing, listed)
    try:
        with _work_folder(output / _WORK, fingerprint) as work:
            _remove_leftovers(output, listed)
            parts = [
                Part(source.name, input, settings, hashing, split, chunk, work / split / f"part-{index:06d}")
                for split, items in listed.items()
                for index, chunk in enumerate(_chunks(items, samples_per_shard))
            ]
            _run(parts, workers, progress)
            _put_in_place(parts, output, work, report)
        report.write(output / REPORT_NAME)
        shutil.rmtree(output / _WORK)
    except OSError as error:
        raise DataError(f"converting into {output} failed: {error}; run the same command to continue") from error
    if not report.written:
        reasons = report.summary() + report.first()
        raise DataError(f"no sample of {input} could be used; {output / REPORT_NAME} gives the reasons: {reasons}")
    return report


def _raise_nothing_listed(input: Path, output: Path, report: ConversionReport) -> NoReturn:
    """Write the report if possible, and raise DataError with the first reason."""
    if not report.skipped:
        raise DataError(f"{input} lists no sample; its annotations are empty")
    message = f"{input} lists no sample that can be used ({report.summary()}{report.first()})"
    try:
        output.mkdir(parents=True, exist_ok=True)
        report.write(output / REPORT_NAME)
    except OSError as error:
        raise DataError(
            f"{message}; the reasons cannot be written to {output / REPORT_NAME}: {format_os_error(error)}"
        ) from error
    raise DataError(f"{message}; {output / REPORT_NAME} lists them all")


def _run(parts: Sequence[Part], workers: int | None, progress: Callable[[int, int], object] | None) -> None:
    """Convert the parts that are not finished yet."""
    waiting = [part for part in parts if not part.report.exists()]
    total = sum(len(part.items) for part in parts)
    finished = total - sum(len(part.items) for part in waiting)
    if progress:
        progress(finished, total)
    run_in_processes(convert_part, waiting, workers, progress and (lambda done: progress(finished + done, total)))


def _put_in_place(parts: Sequence[Part], output: Path, work: Path, report: ConversionReport) -> None:
    """Join the parts of each split in its folder, and add them to the report."""
    for split in dict.fromkeys(part.split for part in parts):
        mine = [part for part in parts if part.split == split]
        report.add(split, join_parts(mine, output / split, work / f"{split}.joined"))
    for split, packed in report.splits.items():
        if report.written and not packed.written:
            shutil.rmtree(output / split, ignore_errors=True)  # left from an earlier conversion


def _check_layout(source: DatasetConverter, input: Path, settings: Settings) -> None:
    if not input.is_dir():
        raise DataError(f"{input} is not a folder; {source.name} needs:\n{source.layout}")
    missing = source.validate_layout(input, settings)
    if missing:
        lines = "\n".join(f"  {line}" for line in missing)
        where = f"\nthe data set is published as: {source.public_name}" if source.public_name else ""
        raise DataError(f"{input} is not a complete folder of {source.title}; it lacks\n{lines}{where}")


def _check_output(output: Path, splits: Collection[str]) -> None:
    """Raise DataError if the splits cannot be written, or if splits of another conversion would remain next to them."""
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir():
        raise DataError(f"{existing} is a file, so the folder {output} cannot be created; name another output")
    for split in splits:
        require_replaceable(output / split)
    for index in sorted(output.glob(f"*/{INDEX_NAME}")):
        if index.parent.name not in splits:
            raise DataError(
                f"{index.parent} is a split that this conversion does not write, and it may share samples with those "
                "that it writes; remove it, or name another output"
            )


def _list(source: DatasetConverter, input: Path, settings: Settings) -> tuple[dict[str, list[Item]], list[Skipped]]:
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


def _items(source: DatasetConverter, input: Path, settings: Settings) -> Iterator[Item | Refused]:
    try:
        yield from source.iter_items(input, settings)
    except OSError as error:
        raise DataError(f"{input} cannot be listed: {format_os_error(error)}") from error


def _remove_leftovers(output: Path, splits: Iterable[str]) -> None:
    """Remove temporary folders of a killed command; the lock guarantees that no other conversion is running."""
    for split in splits:
        for suffix in ("partial", "old"):
            for path in output.glob(f".{glob.escape(split)}.{suffix}-*"):
                shutil.rmtree(path)


def _chunks(items: Sequence[Item], size: int) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def _hashed(skipped: Sequence[Skipped], hashing: Hashing | None) -> list[Skipped]:
    named = [Skipped(hashing.name(one.key), one.reason) for one in skipped] if hashing else skipped
    return generalize(named, hashing)


def _fingerprint(
    source: DatasetConverter,
    input: Path,
    settings: Settings,
    size: int,
    hashing: Hashing | None,
    listed: dict[str, list[Item]],
) -> str:
    salt = hmac.new(hashing.salt, b"fingerprint", hashlib.sha256).hexdigest() if hashing else ""
    fields = sorted(hashing.fields) if hashing else []
    made_by = [__version__, _FORMAT, source.name, str(input.resolve()), settings, size, salt, fields]
    digest = hashlib.sha256(json.dumps(made_by, default=str).encode())
    for items in listed.values():
        for item in items:
            digest.update(json.dumps([item.split, item.key, item.data], sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def _work_folder(path: Path, fingerprint: str) -> Iterator[Path]:
    """Lock the folder of the parts, and clear it first if it belongs to another conversion."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another conversion is writing to {path.parent}; wait until it ends") from error
        known = path / _FINGERPRINT
        if not known.exists() or known.read_text(encoding="utf-8") != fingerprint:
            for old in path.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != _LOCK:
                    old.unlink()
            known.write_text(fingerprint, encoding="utf-8")
        yield path
