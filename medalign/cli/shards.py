"""`medalign shards CONVERTER`: a data set's folder to shards, with the options of its source."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from medalign.cli.values import argument_type, count
from medalign.data.shards.table import image_share, read_table
from medalign.data.shards.writer import PackReport, build_index
from medalign.datasets import REGISTRY
from medalign.datasets.base import IDENTIFIERS, DatasetConverter, Setting
from medalign.datasets.convert import REPORT_NAME, convert
from medalign.datasets.hashing import Hashing, default_salt, read_salt
from medalign.datasets.report import ConversionReport, kind
from medalign.errors import ConfigError, DataError

log = logging.getLogger("medalign")

_NAMED = 20  # refused samples that the log names; the report file names all

_DESCRIPTION = f"""\
Pack a data set into WebDataset shards.

Each split goes into its own folder, OUTPUT/SPLIT, with an index. Samples that cannot be used are skipped; they are
counted by reason, and named in OUTPUT/{REPORT_NAME}. After an interruption the same command goes on where it stopped.

medalign shards CONVERTER --help shows what the folder of a source must hold and what is written."""

_EPILOG = """\
examples:
  medalign shards jsonl --input my_data --output shards/mine
  medalign shards jsonl --input my_data --output shards/mine --split image --group-by patient
  medalign shards slake --input Slake1.0 --output shards/slake --workers 8
  medalign shards mimic-cxr-jpg --input mimic-cxr-jpg/2.1.0 --output shards/mimic --hash-ids"""


def run(words: Sequence[str]) -> int:
    """Convert as the words say. Returns the exit status: 0, for errors are raised."""
    chosen = _parser().parse_args(words)
    if chosen.converter is None:
        return _index(chosen.folders)
    source: DatasetConverter = chosen.converter
    account = _convert(source, chosen)
    for split, report in account.splits.items():
        _say_written(chosen.output / split, report)
    _say_notes(account.notes)
    for one in account.skipped[:_NAMED]:
        log.warning("refused %s", one)
    for reason, times in account.reasons().items():
        log.warning("refused in all %d: %s", times, reason)
    if len(account.skipped) > _NAMED:
        log.warning("every refused sample is named in %s", chosen.output / REPORT_NAME)
    return 0


def _index(folders: Sequence[Path]) -> int:
    """Write the index of tars that are there already. Returns the exit status: 0, for errors are raised."""
    empty = []
    for folder in folders:
        report = build_index(folder)
        _say_written(folder, report)
        _say_notes(report.notes)
        for note in report.ignored:
            log.warning("%s", note)
        for reason in report.refused[:_NAMED]:
            log.warning("refused: %s", reason)
        if len(report.refused) > _NAMED:
            _say_kinds(report.refused)
        if not report.written:
            empty.append(str(folder))
    if empty:
        raise DataError(f"no sample of {', '.join(empty)} can be used, so no index was written there")
    return 0


def _say_kinds(refused: Sequence[str]) -> None:
    """How many samples were refused for each kind of reason."""
    for reason, times in Counter(kind(line.partition(": ")[2]) for line in refused).most_common():
        log.warning("refused in all %d: %s", times, reason)


def _say_written(folder: Path, report: PackReport) -> None:
    """How many samples a folder has, and how many of them have an image: none at all is most often a slip."""
    if not report.written:
        log.info("%s: 0 samples in %d shards", folder, report.shards)
        return
    bare = read_table(folder).without_image
    told = f"{report.written} samples in {report.shards} shards"
    if bare:
        log.warning("%s: %s; %s", folder, told, image_share(report.written, bare))
    else:
        log.info("%s: %s, all with images", folder, told)


def _say_notes(notes: Mapping[str, int]) -> None:
    for note, times in notes.items():
        log.warning("%s: %d times", note, times)


def _convert(source: DatasetConverter, chosen: argparse.Namespace) -> ConversionReport:
    settings = {name: getattr(chosen, name) for name in source.defaults()}
    with tqdm(unit=" samples", desc=source.name, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return convert(
            source,
            chosen.input,
            chosen.output,
            chosen=settings,
            samples_per_shard=chosen.samples_per_shard,
            workers=chosen.workers,
            hashing=_hashing(chosen),
            progress=show,
        )


def _hashing(chosen: argparse.Namespace) -> Hashing | None:
    if not chosen.hash_ids:
        if chosen.salt or chosen.hash_fields:
            raise ConfigError("--salt and --hash-fields say how to hash; give --hash-ids to hash at all")
        return None
    path = chosen.salt or default_salt(chosen.output)
    log.info("identifiers are hashed with the salt %s; keep it apart from the shards", path)
    return Hashing(read_salt(path), IDENTIFIERS | set(chosen.hash_fields))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medalign shards",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = parser.add_subparsers(title="sources", required=True, metavar="CONVERTER")
    for source in REGISTRY.values():
        one = sources.add_parser(
            source.name,
            help=source.title,
            description=_teach(source),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(converter=source)
        _add_common(one)
        if source.settings:
            group = one.add_argument_group(f"options of {source.name}")
            for setting in source.settings:
                _add_setting(group, setting)
    index = sources.add_parser(
        "index",
        help="no data set: write the index of tars that any WebDataset tool packed",
        description="Write index.jsonl beside the tars of each folder, as any WebDataset tool packed them: KEY.json, "
        "KEY.jpg, KEY.png or KEY.dcm, and KEY.1.jpg, KEY.2.png, ... for a sample's further images; KEY ends at the "
        "first point of the base name and may be a path, as in train/0001.jpg. Tars are only read. Images with several "
        "frames are counted; the first is shown. Samples that cannot be used get no row and are named, also those "
        "with a member that may be an image under a name that is not known. Texts and labels beside a sample (KEY.txt, "
        "KEY.cls, ...) are not read, and counted.",
    )
    index.set_defaults(converter=None)
    index.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of .tar files")
    return parser


def _teach(source: DatasetConverter) -> str:
    where = f"Get it under the name: {source.public_name}\n\n" if source.public_name else ""
    return f"{source.title[0].upper()}{source.title[1:]}.\n\n{where}The folder:\n\n{source.layout}"


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder to read")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write one folder a split into"
    )
    parser.add_argument(
        "--samples-per-shard", type=count, default=1000, metavar="N", help="listed samples a shard (default 1000)"
    )
    parser.add_argument("--workers", type=count, metavar="N", help="processes (default: one a core, at most 8)")
    parser.add_argument(
        "--hash-ids",
        action="store_true",
        help=f"replace keys and the fields {', '.join(sorted(IDENTIFIERS))} by keyed hashes; texts and pictures stay "
        "as they are, so names in them do too",
    )
    parser.add_argument(
        "--hash-fields", nargs="+", default=[], metavar="FIELD", help="more fields that --hash-ids replaces"
    )
    parser.add_argument(
        "--salt",
        type=Path,
        metavar="FILE",
        help="the key of the hashes, 16 bytes or more (default: OUTPUT.salt, made once, for its owner's eyes alone)",
    )


def _add_setting(group, setting: Setting) -> None:
    default = " ".join(setting.default) if setting.several and setting.default else setting.default
    told = setting.help if setting.default is None else f"{setting.help} (default {default})"
    several = {"nargs": "+"} if setting.several else {}
    choices = {"choices": setting.choices} if setting.choices else {"metavar": "VALUE"}
    group.add_argument(
        f"--{setting.name}", type=argument_type(setting.parse), default=setting.default, help=told, **several, **choices
    )
