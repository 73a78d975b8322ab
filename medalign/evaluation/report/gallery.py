"""Which questions a report shows: the same number of each kind of error, spread evenly over the data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.answers import given_yes_or_no, yes_or_no
from medalign.evaluation.metrics.scores import group
from medalign.evaluation.report.runs import Evaluation

_CORRECT = MEASURES["questions_correct"]
Errs = Callable[[Prediction], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of error: its key, its name, and whether an answer has it."""

    key: str
    label: str
    errs: Errs


def _wrong(row: Prediction) -> bool:
    return _CORRECT.applies(row) and not _CORRECT.values([row])[0]


def _says(said: str, reference: str) -> Errs:
    return lambda row: _wrong(row) and yes_or_no(row.answer) == reference and given_yes_or_no(row.prediction) == said


# A question belongs to the first kind that any arm's answer has; to the last one if none has any.
KINDS = (
    Kind("false-yes", "false yes", _says("yes", "no")),
    Kind("false-no", "false no", _says("no", "yes")),
    Kind("wrong", "wrong answer", _wrong),
    Kind("wrong-place", "right answer, wrong place", lambda row: group(row) != "report" and row.pointing_hit is False),
    Kind("report", "report", lambda row: False),
    Kind("right", "right answer", lambda row: False),
)


@dataclass(frozen=True)
class Chosen:
    """A question of the gallery."""

    key: str
    kind: Kind
    errs: tuple[bool, ...]  # of each arm, whether its answer has the error


@dataclass(frozen=True)
class Choice:
    """The questions of the gallery by kind, and how many of each kind there are."""

    items: list[Chosen]
    counts: dict[Kind, int]


def choose(evaluations: Sequence[Evaluation], count: int) -> Choice:
    """Choose questions that every arm answered: `count` of each kind, or all where there are fewer.

    Within a kind they are spread evenly over the data set. Questions with boxes and attention, about images that no
    other kind shows, are preferred.

    Args:
        evaluations: one of each arm.
        count: how many of each kind.
    """
    first, *others = (evaluation.predictions for evaluation in evaluations)
    shared = [key for key in first if all(key in other for other in others)]
    found: dict[Kind, list[Chosen]] = {kind: [] for kind in KINDS}
    for key in shared:
        chosen = _classify(key, [evaluation.predictions[key] for evaluation in evaluations])
        found[chosen.kind].append(chosen)
    items: list[Chosen] = []
    for members in found.values():
        shown = {evaluations[0].predictions[item.key].image for item in items}
        items += _spread(_preferred(members, evaluations, shown, count), count)
    return Choice(items, {kind: len(members) for kind, members in found.items() if members})


def _classify(key: str, rows: Sequence[Prediction]) -> Chosen:
    for kind in KINDS:
        errs = tuple(kind.errs(row) for row in rows)
        if any(errs):
            return Chosen(key, kind, errs)
    last = "report" if group(rows[0]) == "report" else "right"
    return Chosen(key, next(kind for kind in KINDS if kind.key == last), errs)


def _preferred(
    members: list[Chosen], evaluations: Sequence[Evaluation], shown: Collection[str], count: int
) -> list[Chosen]:
    """Return the members with boxes, attention and an image that is not shown yet, or those with fewer of these."""
    rows = evaluations[0].predictions
    seen = [item for item in members if all(one.predictions[item.key].attention for one in evaluations)]
    boxed = [item for item in seen if rows[item.key].boxes]
    fresh = [item for item in boxed if rows[item.key].image not in shown]
    return next((part for part in (fresh, boxed, seen) if len(part) >= count), members)


def _spread(members: Sequence[Chosen], count: int) -> list[Chosen]:
    count = min(count, len(members))
    return [members[(2 * i + 1) * len(members) // (2 * count)] for i in range(count)]
