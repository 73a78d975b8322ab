"""Labels the findings of chest reports and short answers by rules. English only.

A text is split into sentences and clauses. In each clause, phrases of the lexicon name findings, and cues before or
after a finding deny it or put it in doubt, as far as their scope reaches:

- A cue before a finding reaches to the end of the clause, or to a comma, "and" or "with" that begins a new statement
  ("No pneumothorax, small effusion"), unless an "or" follows ("No mass, large effusion, or pneumothorax"). One of doubt
  also ends at a comma.
- A cue after a finding reaches back to the last comma, and over a whole list ("Effusion, mass and edema are not seen").
- A denial counts before a doubt. Findings joined by "or" that nothing denies are in doubt.
- Histories and indications say nothing about the image.

A finding is present in a text if one mention says so, otherwise uncertain, otherwise absent. Findings that a text does
not mention have no label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import regex

from medalign.evaluation.findings.lexicon import CUES, NO_FINDING, Lexicon, chest_lexicon
from medalign.evaluation.findings.places import Places, Span, places_of
from medalign.evaluation.findings.scope import Cue, Named, alternatives, inside, inside_or_equal, reaches

Assertion = Literal["present", "uncertain", "absent"]
ORDER: tuple[Assertion, ...] = ("present", "uncertain", "absent")  # of several mentions, the first counts
RULES = "scope-1"  # of this file, `scope` and `places`, for the signature

_SENTENCE = regex.compile(r"(?<=\?)\s+|[.!](?=\s|$|[A-Z])|;|\n+")
_VERSUS = regex.compile(r"(?i)\bvs\.")


@dataclass(frozen=True)
class Mention:
    """A finding in a clause.

    Attributes:
        finding: its name.
        assertion: what the clause says about it.
        places: where it is.
    """

    finding: str
    assertion: Assertion
    places: Places = Places()


@dataclass(frozen=True)
class Label:
    """What a text says about a finding.

    Attributes:
        assertion: present, uncertain or absent.
        sides: "right" and "left", as far as mentions of this assertion name them.
        zones: names in `places.ZONES`, likewise.
    """

    assertion: Assertion
    sides: frozenset[str] = frozenset()
    zones: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reading:
    """What a text says.

    Attributes:
        labels: by finding.
        normal: whether it says that the chest, or a part of it, is normal.
    """

    labels: dict[str, Label]
    normal: bool


class Labeler:
    """Labels texts with the findings of a lexicon.

    Args:
        lexicon: what it knows.
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._read_clause = lru_cache(maxsize=1 << 16)(self._in_clause)  # reports repeat their sentences
        self.signature = f"lexicon:{lexicon.signature}|rules:{RULES}|lang:en"

    def label(self, text: str) -> dict[str, Label]:
        """Return the label of each finding that a text mentions, by name."""
        return self.read(text).labels

    def read(self, text: str) -> Reading:
        """Return the labels of a text, and whether it says that the chest is normal."""
        clauses = list(self._clauses(text))
        mentions = [mention for clause in clauses for mention in self._read_clause(clause)]
        labels = {}
        for finding in dict.fromkeys(one.finding for one in mentions):
            mine = [one for one in mentions if one.finding == finding]
            assertion = min((one.assertion for one in mine), key=ORDER.index)
            places = [one.places for one in mine if one.assertion == assertion]
            sides, zones = (frozenset().union(*parts) for parts in zip(*places, strict=True))
            labels[finding] = Label(assertion, sides, zones)
        normal = any(pattern.search(clause) for clause in clauses for pattern, _ in self.lexicon.normal)
        return Reading(labels, normal)

    def categories(self, reading: Reading) -> dict[str, Assertion]:
        """Return the label of each observation of CheXpert that a text mentions.

        "No Finding" is present if the text denies a finding, or says that the chest is normal, and states none as
        present or uncertain. CheXpert also gives it to texts that say nothing; here, an empty answer earns nothing.
        """
        found: dict[str, Assertion] = {}
        for assertion in reversed(ORDER):
            for name, label in reading.labels.items():
                if label.assertion == assertion:
                    found[self.lexicon.findings[name].category] = assertion
        others = {value for name, value in found.items() if name != "Support Devices"}
        if (reading.normal or "absent" in others) and not {"present", "uncertain"} & others:
            found[NO_FINDING] = "present"
        return found

    def denies_something(self, text: str) -> bool:
        """Return whether a text has any word that denies, whatever it denies."""
        cues = [cue.kind for clause in self._clauses(text) for cue in self._cues(clause)]
        return any(kind.startswith("denied") for kind in cues)

    def mentions(self, text: str) -> list[Mention]:
        """Return all mentions of findings, in order."""
        return [mention for clause in self._clauses(text) for mention in self._read_clause(clause)]

    def _clauses(self, text: str) -> Iterator[str]:
        """Yield the clauses of a text in lowercase, without sections that do not describe the image."""
        for sentence in _SENTENCE.split(_VERSUS.sub("vs", self._without_sections(text))):
            for clause in self.lexicon.clause_end.split(" ".join(sentence.lower().split())):
                if clause.strip():
                    yield clause

    def _without_sections(self, text: str) -> str:
        heads = list(self.lexicon.sections.finditer(text.lower()))
        ends = [*(head.start() for head in heads[1:]), len(text)]
        for head, end in reversed(list(zip(heads, ends, strict=False))):
            if head["skipped"]:
                text = text[: head.start()] + "\n" + text[end:]
        return text

    def _in_clause(self, clause: str) -> list[Mention]:
        named = [one for one in self._named(clause) if one.finding]
        cues = self._cues(clause)
        if any(cue.kind == "past" for cue in cues):
            named = []
        statements = [one.end() for one in self.lexicon.statement_begin.finditer(clause)]
        doubted = alternatives(clause, named)
        places = places_of(clause, [one.span for one in named])
        mentions = []
        for one, where in zip(named, places, strict=True):
            assertion = self._assertion(clause, one, cues, statements, one.span in doubted)
            sided = self.lexicon.findings[one.finding].sided
            mentions.append(Mention(one.finding, assertion, where if sided else Places()))
        return mentions + self._normal(clause, cues)

    def _named(self, clause: str) -> list[Named]:
        """Return the phrases that name findings. One within a longer one does not count."""
        found = [Named(Span(*match.span()), "", False) for match in self.lexicon.other.finditer(clause)]
        for name, entry in self.lexicon.findings.items():
            found += [Named(Span(*match.span()), name, False) for match in entry.present.finditer(clause)]
            if entry.absent is not None:
                found += [Named(Span(*match.span()), name, True) for match in entry.absent.finditer(clause)]
        return sorted(one for one in found if not any(inside(one.span, other.span) for other in found))

    def _cues(self, clause: str) -> list[Cue]:
        """Return the cues; of overlapping ones, the longest, or the first kind in CUES."""
        found = [Cue(Span(*match.span()), kind) for kind in CUES for match in self.lexicon.cues[kind].finditer(clause)]
        kept: list[Cue] = []
        for cue in sorted(found, key=lambda cue: (cue.span.start - cue.span.end, CUES.index(cue.kind))):
            if all(cue.span.end <= other.span.start or other.span.end <= cue.span.start for other in kept):
                kept.append(cue)
        return [cue for cue in kept if cue.kind != "ignored"]

    def _assertion(
        self, clause: str, one: Named, cues: Sequence[Cue], statements: Sequence[int], alternative: bool
    ) -> Assertion:
        inside = {cue.kind.partition("_")[0] for cue in cues if inside_or_equal(cue.span, one.span)}
        if one.denies:  # "heart size is normal", or "is not normal"
            return "uncertain" if "doubted" in inside else "present" if "denied" in inside else "absent"
        kinds = inside | {cue.kind.partition("_")[0] for cue in cues if reaches(clause, cue, one.span, statements)}
        if "denied" in kinds:
            return "absent"
        return "uncertain" if "doubted" in kinds or alternative else "present"

    def _normal(self, clause: str, cues: Sequence[Cue]) -> list[Mention]:
        """Return what statements that a part of the chest is normal deny. With a cue inside, they say nothing."""
        mentions = []
        for pattern, denied in self.lexicon.normal:
            for match in pattern.finditer(clause):
                span = Span(*match.span())
                if not any(inside_or_equal(cue.span, span) or reaches(clause, cue, span, ()) for cue in cues):
                    mentions += [Mention(finding, "absent") for finding in denied]
        return mentions


@cache
def chest_labeler() -> Labeler:
    """Return the labeler of English chest reports."""
    return Labeler(chest_lexicon())
