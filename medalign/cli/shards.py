"""`medalign shards CONVERTER`: packs a data set into shards, with the options of its converter."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medalign.cli.parser import CommandParser, Subparsers
from medalign.cli.values import argument_type, count
from medalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from medalign.data.shards.writer import PackReport
    from medalign.datasets.base import DatasetConverter, Setting
    from medalign.datasets.hashing import Hashing
    from medalign.datasets.report import ConversionReport

log = logging.getLogger("medalign")

_MAX_NAMED = 20  # refused samples that are logged one by one; the report file lists all of them

_DESCRIPTION = """\
Pack a data set into WebDataset shards.

Each split is written to its own folder, OUTPUT/SPLIT, with an index. Samples that cannot be used are skipped, counted
by reason, and listed in OUTPUT/{report}. After an interruption, the same command continues where it stopped.

medalign shards CONVERTER --help shows what the folder of a data set must contain and what is written. CONVERTER can
also be the import path of a converter in another package, package.module:NAME."""

_EPILOG = """\
examples:
  medalign shards jsonl --input my_data --output shards/mine
  medalign shards jsonl --input my_data --output shards/mine --split image --group-by patient
  medalign shards slake --input Slake1.0 --output shards/slake --workers 8
  medalign shards mimic-cxr-jpg --input mimic-cxr-jpg/2.1.0 --output shards/mimic --hash-ids"""

_INDEX = """\
Write index.jsonl next to the tar files of each folder. They may come from any WebDataset tool: KEY.json, KEY.jpg,
KEY.png or KEY.dcm, and KEY.1.jpg, KEY.2.png, ... for further images of a sample. KEY ends at the first dot of the base
name and may be a path, as in train/0001.jpg. The tar files are only read.

If an image has several frames, the first one is used; such images are counted. A sample that cannot be used gets no row
and is reported. This includes a sample with a member that may be an image but has an unknown suffix. Texts and labels
in other members of a sample (KEY.txt, KEY.cls, ...) are not read; they are counted."""


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`. The converters and their options are added when the command is used."""
    parser = subparsers.add_parser(
        "shards",
        help="pack a data set into WebDataset shards; index tar files from other tools",
        epilog=_EPILOG,
    )
    parser.set_defaults(command=run)
    parser.complete = _add_converters


def run(arguments: argparse.Namespace) -> int:
    """Convert a data set, or index tar files. Returns the exit status."""
    if arguments.converter is None:
        return _index(arguments.folders)
    report = _convert(arguments.converter, arguments)
    for split, packed in report.splits.items():
        _log_written(arguments.output / split, packed)
    _log_notes(report.notes)
    for skipped in report.skipped[:_MAX_NAMED]:
        log.warning("refused %s", skipped)
    for reason, times in report.reasons().items():
        log.warning("%d x refused: %s", times, reason)
    if report.skipped:
        from medalign.datasets.convert import REPORT_NAME

        log.warning("all refused samples are listed in %s", arguments.output / REPORT_NAME)
    return 0


def _index(folders: Sequence[Path]) -> int:
    """Write the index of existing tar files. Returns the exit status."""
    from medalign.data.shards.writer import build_index

    empty = []
    for folder in folders:
        report = build_index(folder)
        _log_written(folder, report)
        _log_notes(report.notes)
        for note in report.ignored:
            log.warning("%s", note)
        for reason in report.refused[:_MAX_NAMED]:
            log.warning("refused: %s", reason)
        if len(report.refused) > _MAX_NAMED:
            _log_kinds(report.refused)
        if not report.written:
            empty.append(str(folder))
    if empty:
        raise DataError(
            f"no sample of {', '.join(empty)} can be used, so no index was written there; see the reasons above"
        )
    return 0


def _log_kinds(refused: Sequence[str]) -> None:
    """Log how many samples were refused for each kind of reason."""
    from medalign.datasets.report import kind

    for reason, times in Counter(kind(line.partition(": ")[2]) for line in refused).most_common():
        log.warning("%d x refused: %s", times, reason)


def _log_written(folder: Path, report: PackReport) -> None:
    """Log how many samples a folder has and how many have an image. Samples without one are usually a mistake."""
    from medalign.data.shards.table import image_share
    from medalign.data.shards.table_reader import read_table

    if not report.written:
        log.info("%s: 0 samples in %d shards", folder, report.shards)
        return
    without_image = read_table(folder).without_image
    size = f"{report.written} samples in {report.shards} shards"
    if without_image:
        log.warning("%s: %s; %s", folder, size, image_share(report.written, without_image))
    else:
        log.info("%s: %s, all with images", folder, size)


def _log_notes(notes: Mapping[str, int]) -> None:
    for note, times in notes.items():
        log.warning("%s: %d times", note, times)


def _convert(converter: DatasetConverter, arguments: argparse.Namespace) -> ConversionReport:
    from tqdm import tqdm

    from medalign.datasets.convert import convert

    settings = {name: getattr(arguments, name) for name in converter.defaults()}
    with tqdm(unit=" samples", desc=converter.name, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return convert(
            converter,
            arguments.input,
            arguments.output,
            chosen=settings,
            samples_per_shard=arguments.samples_per_shard,
            workers=arguments.workers,
            hashing=_hashing(arguments),
            progress=show,
        )


def _hashing(arguments: argparse.Namespace) -> Hashing | None:
    from medalign.datasets.base import IDENTIFIERS
    from medalign.datasets.hashing import Hashing, default_salt, read_salt

    if not arguments.hash_ids:
        if arguments.salt or arguments.hash_fields:
            raise ConfigError("--salt and --hash-fields have no effect without --hash-ids; add it, or omit them")
        return None
    path = arguments.salt or default_salt(arguments.output)
    log.info("identifiers are hashed with the salt %s; do not store it with the shards", path)
    return Hashing(read_salt(path), IDENTIFIERS | set(arguments.hash_fields))


def _add_converters(parser: CommandParser, words: Sequence[str]) -> None:
    """Add a command for each packaged converter, for one of another package if it is given, and `index`."""
    from medalign.datasets import REGISTRY, get_converter, is_import_path
    from medalign.datasets.convert import REPORT_NAME

    parser.description = _DESCRIPTION.format(report=REPORT_NAME)
    converters = parser.add_subparsers(title="converters", required=True, metavar="CONVERTER")
    for converter in (*REGISTRY.values(), *map(get_converter, filter(is_import_path, words[:1]))):
        one = converters.add_parser(converter.name, help=converter.title, description=_describe(converter))
        one.set_defaults(converter=converter)
        _add_common(one)
        if converter.settings:
            group = one.add_argument_group(f"options of {converter.name}")
            for setting in converter.settings:
                _add_setting(group, setting)
    index = converters.add_parser(
        "index",
        help="write only the index of tar files from any WebDataset tool",
        description=_INDEX,
    )
    index.set_defaults(converter=None)
    index.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of .tar files")


def _describe(converter: DatasetConverter) -> str:
    source = f"Published as: {converter.public_name}\n\n" if converter.public_name else ""
    return f"{converter.title[0].upper()}{converter.title[1:]}.\n\n{source}The folder:\n\n{converter.layout}"


def _add_common(parser: argparse.ArgumentParser) -> None:
    from medalign.datasets.base import IDENTIFIERS

    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder to read")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write one folder per split into"
    )
    parser.add_argument(
        "--samples-per-shard", type=count, default=1000, metavar="N", help="samples per shard (default %(default)s)"
    )
    parser.add_argument("--workers", type=count, metavar="N", help="processes (default: one per core, at most 8)")
    parser.add_argument(
        "--hash-ids",
        action="store_true",
        help=f"replace keys and the fields {', '.join(sorted(IDENTIFIERS))} by keyed hashes; texts and pictures are "
        "not changed, so names in them remain",
    )
    parser.add_argument(
        "--hash-fields", nargs="+", default=[], metavar="FIELD", help="further fields that --hash-ids replaces"
    )
    parser.add_argument(
        "--salt",
        type=Path,
        metavar="FILE",
        help="the key of the hashes, at least 16 bytes (default: OUTPUT.salt, made once, readable only by its owner)",
    )


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    default = " ".join(setting.default) if setting.several and setting.default else setting.default
    text = setting.help if setting.default is None else f"{setting.help} (default {default})"
    several: dict[str, Any] = {"nargs": "+"} if setting.several else {}
    choices: dict[str, Any] = {"choices": setting.choices} if setting.choices else {"metavar": "VALUE"}
    group.add_argument(
        f"--{setting.name}", type=argument_type(setting.parse), default=setting.default, help=text, **several, **choices
    )
