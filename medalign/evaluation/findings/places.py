"""Sides and zones that a clause names, and the finding that each of them belongs to.

| place | words |
| --- | --- |
| right, left | the words; both for "both", "bilateral" and the like |
| upper, middle, lower | before lobe, zone, field, third and the like; apex; base; the lingula is left middle |
| central, peripheral | perihilar, hilar; peripheral, subpleural |

The abbreviations of lobes (RUL to LLL) name a side and a zone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import regex

SIDES = ("right", "left")
ZONES = ("upper", "middle", "lower", "central", "peripheral")

_REGION = r"(?:lobes?|lobar|zones?|fields?|lungs?|thirds?|(?:hemi)?thora(?:x|ces)|regions?|segments?|portions?|parts?)"
_BOTH = r"both|bilateral(?:ly)?|(?:bi)(?:basilar|basal|apical)"
_VIEW = r"(?!\s+lateral\s+(?:chest|view|projection|decubitus|radiograph|film))"
_SIDE = regex.compile(
    rf"(?<!\w)(?:(?P<right>right{_VIEW}|r[uml]l)|(?P<left>left{_VIEW}|l[ul]l|lingular?)|(?P<both>{_BOTH}))(?!\w)"
)
_AHEAD = rf"(?=(?:[\s,/-]+\w+){{0,4}}?[\s-]+{_REGION}\b)"
_ZONE = regex.compile(
    rf"(?<!\w)(?:(?P<upper>upper{_AHEAD}|[rl]ul|(?:bi)?apical|apex|apices)"
    rf"|(?P<middle>(?:middle|mid){_AHEAD}|mid(?=zone|lung)|rml|lingular?)"
    rf"|(?P<lower>lower{_AHEAD}|[rl]ll|(?:bi)?bas(?:al|ilar)|bases?|retrocardiac|costophrenic|cp)"
    rf"|(?P<central>(?:peri)?hil(?:ar|um|a))|(?P<peripheral>peripheral(?:ly)?|periphery|subpleural))(?:\w*zone)?(?!\w)"
)
_LEVEL = r"(?:upper|middle|mid|lower)"  # a joint between two of them does not divide a clause
_JOINT = regex.compile(rf",|(?<!\w)(?:with|(?:and|or)(?!(?<={_LEVEL}(?:\s+\w+)?\s+\w+)\s+{_LEVEL}(?!\w)))(?!\w)")


class Span(NamedTuple):
    """Where a text is, from start to end (exclusive)."""

    start: int
    end: int


class Places(NamedTuple):
    """Sides and zones."""

    sides: frozenset[str] = frozenset()
    zones: frozenset[str] = frozenset()


def places_in(text: str) -> Places:
    """Return the sides and zones that a lowercase text names."""
    sides = {found.lastgroup for found in _SIDE.finditer(text)}
    both = set(SIDES) if "both" in sides else set()
    zones = {str(found.lastgroup) for found in _ZONE.finditer(text)}
    return Places(frozenset({str(side) for side in sides if side != "both"} | both), frozenset(zones))


def places_of(clause: str, mentions: Sequence[Span]) -> list[Places]:
    """Return the places of each mention of a finding in a clause.

    The clause is divided between two mentions at the first joint (a comma, "and", "or", "with"). A part without a place
    takes that of the part before it if "and" or "or" joins them and its place comes before its finding ("left effusion
    and consolidation"), otherwise that of the part after it whose place comes last ("effusion and consolidation on the
    left").

    Args:
        clause: lowercase text.
        mentions: the findings in it, in order.
    """
    if not mentions:
        return []
    cuts, joints = [0], [""]
    for one, other in zip(mentions, mentions[1:], strict=False):
        joint = _JOINT.search(clause, one.end, max(one.end, other.start))
        cuts.append(joint.start() if joint else cuts[-1])
        joints.append(joint[0] if joint else "")
    ends = [*cuts[1:], len(clause)]
    # Mentions without a joint between them share a part.
    parts = [clause[start : max(end, start)] for start, end in zip(cuts, ends, strict=True)]
    for i in range(len(parts) - 2, -1, -1):
        if cuts[i] == cuts[i + 1]:
            parts[i] = parts[i + 1]
    found = [places_in(part) for part in parts]
    for i in range(1, len(found)):
        before = clause[cuts[i - 1] : mentions[i - 1].start]
        if found[i] == Places() and joints[i] in ("and", "or") and any(places_in(before)):
            found[i] = found[i - 1]
    for i in range(len(found) - 2, -1, -1):
        after = clause[mentions[i + 1].end : ends[i + 1]]
        if found[i] == Places() and any(places_in(after)):
            found[i] = found[i + 1]
    return found
