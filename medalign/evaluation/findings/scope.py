"""How far cues of negation and doubt reach in a clause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import regex

from medalign.evaluation.findings.places import Span

_VERB = regex.compile(r"(?<!\w)(?:is|are|was|were|has|have|shows?|seen)(?!\w)")
_OR = regex.compile(r"(?<!\w)n?or(?!\w)")
_LIST = regex.compile(r"(?<!\w)(?:and|n?or)(?!\w)")
_JOINT = regex.compile(rf",|{_LIST.pattern}")
_ALTERNATIVE = regex.compile(r"\s*(?:(?:and/)?or|versus|vs|/)(?:\s+(?:an?|the|\w+ed|\w+y|\w+al))?\s*")


class Named(NamedTuple):
    """A phrase of the lexicon in a clause."""

    span: Span
    finding: str  # "" for a phrase that names none
    denies: bool  # whether the phrase itself says that the finding is absent


class Cue(NamedTuple):
    """A cue in a clause, of a kind in `lexicon.CUES`."""

    span: Span
    kind: str


def inside(one: Span, other: Span) -> bool:
    """Return whether a span is within a longer one."""
    return one != other and other.start <= one.start and one.end <= other.end


def inside_or_equal(one: Span, other: Span) -> bool:
    """Return whether a span is within another one, or the same."""
    return other.start <= one.start and one.end <= other.end


def reaches(clause: str, cue: Cue, span: Span, statements: Sequence[int]) -> bool:
    """Return whether a finding is in the scope of a cue.

    Args:
        clause: the clause.
        cue: before or after the finding.
        span: of the finding.
        statements: where new statements begin.
    """
    if cue.kind.endswith("_before"):
        if span.start < cue.span.end:
            return False
        between = [at for at in statements if cue.span.end < at <= span.start]
        if cue.kind.startswith("doubted"):
            between += [at.end() for at in regex.finditer(",", clause, pos=cue.span.end, endpos=span.start)]
        return not any(not _OR.search(clause, at) for at in between)
    return span.end <= cue.span.start and _list_start(clause, cue.span.start, statements) <= span.start


def _list_start(clause: str, end: int, statements: Sequence[int]) -> int:
    """Return where the list begins that a cue at `end` follows."""
    start = max((at for at in statements if at <= end), default=0)
    for joint in _JOINT.finditer(clause, start, end):
        if _VERB.search(clause, start, joint.start()):  # the words before it have their own verb
            start = joint.end()
    comma = clause.rfind(",", start, end) + 1
    return max(start, comma) if not _LIST.search(clause, comma, end) else start


def alternatives(clause: str, named: Sequence[Named]) -> set[Span]:
    """Return the spans of findings that "or" joins."""
    found = set()
    for one, other in zip(named, named[1:], strict=False):
        if one.span.end <= other.span.start and _ALTERNATIVE.fullmatch(clause[one.span.end : other.span.start]):
            found |= {one.span, other.span}
    return found
