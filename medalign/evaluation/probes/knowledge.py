"""Which findings the data say are present in an image, and which absent.

1. A field `findings` of the annotation (a list of names, or of objects with `kind`, `name` or `finding`) is complete:
   the findings that it does not have are absent, as far as the field of any other image has them.
2. Without it, what the reports state and deny (`evaluation.findings`), and the answers to yes-or-no questions that name
   one finding and no place. What any of them states as present counts before what another one denies. What a report
   doubts, or nothing mentions, is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medalign.evaluation.findings import Labeler
from medalign.evaluation.metrics.answers import yes_or_no

_NAMES = ("kind", "name", "finding")


@dataclass(frozen=True)
class Known:
    """Findings of one image, in the order of the lexicon."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass
class Evidence:
    """What the samples of one image say.

    Attributes:
        annotated: the findings that the annotation states; None without the field.
        doubted: those that it names with doubt, such as "possible edema".
        reports: texts.
        answers: question and answer.
    """

    annotated: set[str] | None = None
    doubted: set[str] = field(default_factory=set)
    reports: set[str] = field(default_factory=set)
    answers: set[tuple[str, str]] = field(default_factory=set)

    def add(self, fields: Mapping[str, Any], labeler: Labeler) -> None:
        """Add the fields of a sample."""
        if isinstance(listed := fields.get("findings"), list):
            named = [pair for one in listed for pair in _named(one, labeler)]
            self.annotated = (self.annotated or set()) | {name for name, assertion in named if assertion == "present"}
            self.doubted |= {name for name, assertion in named if assertion == "uncertain"}
        if report := report_of(fields):
            self.reports.add(report)
        if fields.get("task") == "vqa" and yes_or_no(str(fields.get("answer"))):
            self.answers.add((str(fields.get("question")), str(fields["answer"])))


def report_of(fields: Mapping[str, Any]) -> str:
    """Return the report or caption in the fields of a sample, or ""."""
    texts = (fields.get(name) for name in ("report", "caption"))
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def known_findings(images: Iterable[Evidence], labeler: Labeler) -> list[Known]:
    """Return what is known of each image."""
    found = list(images)
    universe = set().union(*(one.annotated for one in found if one.annotated is not None))
    return [_known(one, universe, labeler) for one in found]


def _known(evidence: Evidence, universe: set[str], labeler: Labeler) -> Known:
    order = list(labeler.lexicon.findings)
    if evidence.annotated is not None:
        present, absent = evidence.annotated, universe - evidence.annotated - evidence.doubted
    else:
        labels = [labeler.label(text) for text in sorted(evidence.reports)]
        said: list[tuple[str, str]] = [(name, label.assertion) for one in labels for name, label in one.items()]
        said += [pair for asked in sorted(evidence.answers) for pair in _answered(*asked, labeler)]
        present, doubted, absent = ({n for n, a in said if a == want} for want in ("present", "uncertain", "absent"))
        absent -= present | doubted
    return Known(tuple(sorted(present, key=order.index)), tuple(sorted(absent, key=order.index)))


def _answered(question: str, answer: str, labeler: Labeler) -> list[tuple[str, str]]:
    """Return what yes or no says about the only finding that a question names, if it names no place."""
    mentions = labeler.mentions(question.replace("?", " "))
    if len(mentions) != 1 or any(mentions[0].places) or mentions[0].assertion == "uncertain":
        return []
    agrees = (yes_or_no(answer) == "yes") == (mentions[0].assertion == "present")
    return [(mentions[0].finding, "present" if agrees else "absent")]


def _named(entry: Any, labeler: Labeler) -> list[tuple[str, str]]:
    """Return the findings that an entry of the annotation's list names, with what it says about them."""
    if isinstance(entry, Mapping):
        entry = next((entry[name] for name in _NAMES if isinstance(entry.get(name), str)), None)
    labels = labeler.label(entry) if isinstance(entry, str) else {}
    return [(name, label.assertion) for name, label in labels.items()]
