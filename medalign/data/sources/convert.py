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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign import __version__
from medalign.data.listing import INDEX_NAME
from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.shards import PackReport, join_shards, require_replaceable, write_shards
from medalign.data.sources import find
from medalign.data.sources.account import Account, Skipped, kind
from medalign.data.sources.hashing import Hashing
from medalign.data.sources.pool import in_processes
from medalign.data.sources.source import Chosen, Item, Source
from medalign.errors import DataError

REPORT_NAME = "conversion.json"
_WORK = ".conversion"
_PART_VERSION = 2  # of what a part holds: older ones are made again
_LOCK, _FINGERPRINT = ".lock", ".fingerprint"  # in it, beside the splits, whose names begin with no point


@dataclass(frozen=True)
class Part:
    """The listed samples of one shard, and all that a process needs to convert them."""

    source: str
    input: Path
    chosen: dict[str, Any]
    hashing: Hashing | None
    split: str
    items: tuple[Item, ...]
    shards: Path  # folder to write

    @property
    def account(self) -> Path:
        """The file whose presence says that the part is finished."""
        return self.shards.with_suffix(".json")


def convert(
    source: Source,
    input: Path,
    output: Path,
    *,
    chosen: Chosen | None = None,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    hashing: Hashing | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Account:
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
    account = Account(source.name, settings, _hashed(skipped, hashing))
    if not listed:
        raise DataError(f"{input} lists no sample that can be used ({account.summary()})")
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
        raise DataError(f"no sample of {input} could be used; {output / REPORT_NAME} says why: {account.summary()}")
    return account


def _run(parts: Sequence[Part], workers: int | None, progress: Callable[[int, int], object] | None) -> None:
    """Convert the parts that are not finished yet."""
    waiting = [part for part in parts if not part.account.exists()]
    total = sum(len(part.items) for part in parts)
    finished = total - sum(len(part.items) for part in waiting)
    if progress:
        progress(finished, total)
    in_processes(convert_part, waiting, workers, progress and (lambda done: progress(finished + done, total)))


def _put_in_place(parts: Sequence[Part], output: Path, work: Path, account: Account) -> None:
    """Join the parts of each split in its folder, and enter it in the account."""
    for split in dict.fromkeys(part.split for part in parts):
        mine = [part for part in parts if part.split == split]
        account.add(split, _join(mine, output / split, work / f"{split}.joined"))
    for split, report in account.splits.items():
        if account.written and not report.written:
            shutil.rmtree(output / split, ignore_errors=True)  # what an earlier conversion had in it


def convert_part(part: Part, progress: Callable[[int], object]) -> None:
    """Write a part's shard and then its account; `progress` is called with 1 for each item."""
    shutil.rmtree(part.shards, ignore_errors=True)
    report = write_shards(
        _records(part, progress), part.shards, samples_per_shard=max(1, len(part.items)), allow_empty=True
    )
    refused = [line.partition(": ") for line in report.refused]
    skipped = [Skipped(key, reason) for key, _, reason in refused]
    names = [[one.key, one.reason] for one in _reasons(skipped, part.hashing)]
    text = json.dumps({"skipped": names, "several_frames": report.several_frames})
    partial = part.account.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(part.account)


def _records(part: Part, progress: Callable[[int], object]) -> Iterator[Record | Refused]:
    source = find(part.source)
    for item in part.items:
        try:
            record = source.record(part.input, item, part.chosen)
            yield part.hashing.record(record) if part.hashing else record
        except BadSample as error:
            yield Refused(part.hashing.name(item.key) if part.hashing else item.key, str(error))
        progress(1)


def _join(parts: Sequence[Part], output: Path, marker: Path) -> tuple[PackReport, list[Skipped]]:
    """The split's shards in their place; `marker` remembers it, should the command stop before the last split."""
    told = [json.loads(part.account.read_text(encoding="utf-8")) for part in parts]
    skipped = [Skipped(*pair) for one in told for pair in one["skipped"]]
    several = tuple(key for one in told for key in one["several_frames"])
    usable = sum(len(part.items) for part in parts) > len(skipped)
    if not usable:
        return PackReport(0, 0, ()), skipped
    if not marker.exists():
        report = join_shards([part.shards for part in parts], output)
        marker.write_text(json.dumps([report.written, report.shards]), encoding="utf-8")
    written, shards = json.loads(marker.read_text(encoding="utf-8"))
    return PackReport(written, shards, (), several), skipped


def _check_layout(source: Source, input: Path, settings: Chosen) -> None:
    if not input.is_dir():
        raise DataError(f"{input} is no folder; {source.name} needs:\n{source.layout}")
    missing = source.missing(input, settings)
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


def _list(source: Source, input: Path, settings: Chosen) -> tuple[dict[str, list[Item]], list[Skipped]]:
    listed: dict[str, list[Item]] = {}
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for item in source.items(input, settings):
        if isinstance(item, Refused):
            skipped.append(Skipped(item.name, item.reason))
        elif item.key in seen:
            skipped.append(Skipped(item.key, "key occurs a second time; keys must be unique"))
        else:
            seen.add(item.key)
            listed.setdefault(item.split, []).append(item)
    return listed, skipped


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
    return _reasons(named, hashing)


def _reasons(skipped: Sequence[Skipped], hashing: Hashing | None) -> list[Skipped]:
    """Where names are hashed, a reason must not tell them either: its kind is kept, its particulars are not."""
    return [Skipped(one.key, kind(one.reason) if hashing else one.reason) for one in skipped]


def _fingerprint(
    source: Source, settings: Chosen, size: int, hashing: Hashing | None, listed: dict[str, list[Item]]
) -> str:
    salt = hmac.new(hashing.salt, b"fingerprint", hashlib.sha256).hexdigest() if hashing else ""
    fields = sorted(hashing.fields) if hashing else []
    told = [__version__, _PART_VERSION, source.name, settings, size, salt, fields]
    digest = hashlib.sha256(json.dumps(told, default=str).encode())
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
