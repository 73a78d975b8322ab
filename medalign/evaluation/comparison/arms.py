"""Reads the arms of a comparison: one or several seeds of each system, on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medalign.errors import ConfigError, DataError
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.scores_file import predictions_file, read_rows
from medalign.run_folder import EvaluationFolder, find_run

CLUSTERS = ("image", "patient", "key")
Seed = dict[tuple[int, str], Prediction]  # predictions by folder and key


@dataclass(frozen=True)
class Arm:
    """One system: the predictions of each of its seeds."""

    name: str
    paths: tuple[Path, ...]
    seeds: tuple[Seed, ...]


def read_arm(word: str, evaluation: str | None = None) -> Arm:
    """Read an arm from its word on the command line.

    Args:
        word: `PATH`, `NAME=PATH`, or `NAME=PATH,PATH,...` with one path per seed. A path is a file of predictions, the
            folder of an evaluation, or a run.
        evaluation: which evaluation of a run; it may be None if each run has only one.

    Raises:
        DataError: a file does not exist or is not a file of predictions.
        ConfigError: a run has several evaluations, and none is chosen.
    """
    name, places = parse_word(word)
    paths = tuple(_predictions_of(place, evaluation) for place in places)
    if len(set(paths)) < len(paths):
        raise ConfigError(f"arm {name or word} names the same predictions twice; give each seed once")
    return Arm(name or word, paths, tuple({(row.folder, row.key): row for row in read_rows(path)} for path in paths))


def parse_word(word: str) -> tuple[str, list[Path]]:
    """Return the name of an arm and one path per seed. The name of `PATH`, or of `PATH,PATH,...`, is empty."""
    name, mark, rest = word.partition("=")
    if _exists(word) or not mark:
        name, rest = "", word
    return name, [Path(text) for text in ([rest] if _exists(rest) else rest.split(","))]


def _exists(word: str) -> bool:
    with suppress(OSError):  # the names of several seeds in a row may be too long for a file
        return Path(word).exists()
    return False


def _predictions_of(path: Path, evaluation: str | None) -> Path:
    if not path.is_dir() or EvaluationFolder(path).predictions.is_file():
        return predictions_file(path)
    home, prefix = find_run(path)
    if evaluation is not None:
        return predictions_file(home.evaluation(prefix + evaluation).path)
    found = home.evaluations(prefix)
    if len(found) == 1:
        return predictions_file(found[0].path)
    if not found:
        raise DataError(f"{path} contains no evaluation; evaluate the run first (medalign evaluate)")
    names = ", ".join(one.path.name.removeprefix(prefix) for one in found)
    raise ConfigError(f"{path} has several evaluations ({names}); choose one with --name")


def require_same_samples(baseline: Arm, arm: Arm) -> None:
    """Raise DataError if two arms were not measured on the same samples, seed by seed.

    Raises:
        ConfigError: the arms have different numbers of seeds.
    """
    if len(arm.seeds) != len(baseline.seeds):
        raise ConfigError(
            f"arm {arm.name} has {len(arm.seeds)} seeds and {baseline.name} has {len(baseline.seeds)}; give as many of "
            "each, in the same order"
        )
    for one, other, path, second in zip(baseline.seeds, arm.seeds, baseline.paths, arm.paths, strict=True):
        for here, there, present, absent in ((one, other, path, second), (other, one, second, path)):
            if missing := here.keys() - there.keys():
                _, key = min(missing)
                raise DataError(
                    f"{len(missing)} of {len(here)} samples of {present} are not in {absent}, such as {key!r}; "
                    "evaluate both on the same data with the same --limit"
                )
        for place, row in one.items():
            twin = other[place]
            if (row.task, row.question, row.answer) != (twin.task, twin.question, twin.answer):
                raise DataError(
                    f"sample {row.key!r} has another question or reference in {second} than in {path}; evaluate both "
                    "on the same data"
                )


def clusters(pairs: Sequence[tuple[Prediction, Prediction]], by: str, paths: tuple[Path, Path]) -> list[str]:
    """Return the name of the cluster of each sample.

    Args:
        pairs: each sample in both arms.
        by: "image", "patient" or "key"; with "key", each sample is a cluster.
        paths: the files of both arms, for messages.

    Raises:
        DataError: samples do not name their image or patient, or the arms disagree on it.
    """
    if by == "key":
        return [f"{row.folder}/{row.key}" for row, _ in pairs]
    names, unnamed = [], 0
    for row, twin in pairs:
        here, there = getattr(row, by), getattr(twin, by)
        if here and there and here != there:
            raise DataError(f"sample {row.key!r} has another {by} in {paths[1]} than in {paths[0]}; compare equal data")
        without_image = by == "image" and row.image_size is None and twin.image_size is None
        unnamed += not (here or there or without_image)
        names.append(f"{by} {here or there}" if here or there else f"key {row.folder}/{row.key}")
    if unnamed or not any(name.startswith(by) for name in names):
        raise DataError(
            f"{unnamed or len(pairs)} of {len(pairs)} samples do not name their {by} in {paths[0]} or {paths[1]}; "
            f"evaluate again, or choose another of --by {', '.join(CLUSTERS)} (key takes samples as independent)"
        )
    return names
