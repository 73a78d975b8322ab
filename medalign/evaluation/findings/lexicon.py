"""The lexicon of the labeler: findings, cues and section headings, read from chest.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import regex
import yaml

CUES = (
    *("ignored", "doubted_before", "doubted_after"),  # of cues of equal length, the first kind counts
    *("denied_before", "denied_after", "past"),
)
NOT_LUNG = "support devices"  # what no statement that the chest is normal denies
NO_FINDING = "No Finding"  # the category of CheXpert that no words name


@dataclass(frozen=True)
class Entry:
    """A finding.

    Attributes:
        name: its name.
        category: the observation of CheXpert that it belongs to.
        noun: with its article, as in "Is there NOUN?".
        asked: a question that presupposes it.
        sided: whether it has a side and a zone.
        present: what names it.
        absent: what states that it is not there; None if nothing does.
    """

    name: str
    category: str
    noun: str
    asked: str
    sided: bool
    present: regex.Pattern[str]
    absent: regex.Pattern[str] | None


@dataclass(frozen=True)
class Lexicon:
    """What the labeler knows.

    Attributes:
        findings: by name.
        other: phrases that contain the name of a finding and name none.
        normal: each statement of normality with the findings that it denies.
        cues: by kind (CUES).
        clause_end: words that end a clause.
        statement_begin: a comma, "and" or "with" before a word that begins a new statement.
        sections: headings, in group "skipped" or "kept".
        signature: version of the lexicon and the first 32 bits of its SHA-256.
    """

    findings: Mapping[str, Entry]
    other: regex.Pattern[str]
    normal: Sequence[tuple[regex.Pattern[str], tuple[str, ...]]]
    cues: Mapping[str, regex.Pattern[str]]
    clause_end: regex.Pattern[str]
    statement_begin: regex.Pattern[str]
    sections: regex.Pattern[str]
    signature: str

    @property
    def categories(self) -> tuple[str, ...]:
        """The 14 observations of CheXpert."""
        return (NO_FINDING, *dict.fromkeys(entry.category for entry in self.findings.values()))


@cache
def chest_lexicon() -> Lexicon:
    """Read the packaged lexicon of chest reports."""
    text = resources.files("medalign.evaluation.findings").joinpath("chest.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    findings = {name: _entry(name, values) for name, values in content["findings"].items()}
    lungs = tuple(name for name in findings if name != NOT_LUNG)
    starts = "|".join(content["statement_begin"].split("|")).replace(" ", "")
    return Lexicon(
        findings=findings,
        other=_phrases(content["other"]),
        normal=[
            (_phrases([one["says"]]), lungs if one["denies"] == "all" else tuple(one["denies"]))
            for one in content["normal"]
        ],
        cues={kind: _phrases(content["cues"][kind]) for kind in CUES},
        clause_end=_phrases(content["clause_end"]),
        statement_begin=regex.compile(rf"(?:,(?:\s*and)?|\band|\bwith)\s+(?=(?:{starts})\b)"),
        sections=_sections(content["skipped_sections"], content["headings"]),
        signature=f"{content['version']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}",
    )


def _entry(name: str, values: Mapping[str, Any]) -> Entry:
    absent = _phrases(values["absent"]) if "absent" in values else None
    known = {key: values[key] for key in ("category", "noun", "asked", "sided")}
    return Entry(name=name, **known, present=_phrases(values["present"]), absent=absent)


def _phrases(patterns: Sequence[str]) -> regex.Pattern[str]:
    """Compile patterns for lowercase text: whole words, a space for any white space or a hyphen, the longest match."""
    spaced = [pattern.replace(" ?", r"[\s-]*").replace(" ", r"[\s-]+") for pattern in patterns]
    return regex.compile(rf"(?:(?<!\w)|(?=\W))(?:{'|'.join(spaced)})(?:(?!\w)|(?<=\W))", regex.POSIX)


def _sections(skipped: str, kept: str) -> regex.Pattern[str]:
    parts = [part.replace(" ", r"\s+").replace("|\\s+", "|") for part in (skipped, kept)]
    return regex.compile(rf"(?:(?<=[.\n])\s*|^\s*)(?:(?P<skipped>{parts[0]})|(?P<kept>{parts[1]}))\s*:")
