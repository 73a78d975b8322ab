"""Reports in varied wording, and questions whose answers cannot be guessed from the question.

Closed questions are balanced: over many studies, each wording is answered by yes as often as by no, so that a model
that ignores the image has an accuracy of one half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medalign.phantom.contracts import KINDS, SIDES, Finding, Kind, Question, Side

_NOUN: dict[Kind, str] = {
    "nodule": "nodule",
    "effusion": "pleural effusion",
    "consolidation": "consolidation",
    "pneumothorax": "pneumothorax",
    "cardiomegaly": "cardiomegaly",
}
_PRESENT: dict[Kind, tuple[str, ...]] = {
    "nodule": (
        "There is a {size} nodule in the {place}.",
        "A {size} nodule projects over the {place}.",
        "{Size} rounded nodule, {place}.",
    ),
    "effusion": (
        "There is a {size} {side} pleural effusion.",
        "{Size} pleural effusion in the {place}.",
        "Blunting of the {side} costophrenic angle by a {size} effusion.",
    ),
    "consolidation": (
        "There is a {size} consolidation in the {place}.",
        "{Size} patchy consolidation in the {place}.",
        "A {size} area of consolidation is seen in the {place}.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "{Size} pneumothorax in the {place}.",
        "A {size} {side} apical pneumothorax is seen.",
    ),
    "cardiomegaly": ("The heart is enlarged.", "There is cardiomegaly.", "Enlarged cardiac silhouette."),
}
_ABSENT: dict[Kind, tuple[str, ...]] = {
    "nodule": ("No nodule.", "No nodule is seen."),
    "effusion": ("No pleural effusion.", "The costophrenic angles are sharp."),
    "consolidation": ("No consolidation.", "No focal consolidation is seen."),
    "pneumothorax": ("No pneumothorax.", "No pneumothorax is seen."),
    "cardiomegaly": ("Heart size is normal.", "The heart is not enlarged."),
}
_NORMAL = ("The lungs are clear.", "Normal chest radiograph.", "No acute abnormality.", "Both lungs are clear.")

# Fractions of studies in which a question can have the answer yes, given the counts in `findings`; see _balance.
_ABNORMAL, _SIDED = 0.75, 0.70


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def write_report(rng: np.random.Generator, findings: Sequence[Finding]) -> str:
    """Describe the findings in random order, then one or two findings that are absent."""
    present = [_describe(rng, findings[i]) for i in rng.permutation(len(findings))]
    absent_kinds = [kind for kind in KINDS if kind not in {finding.kind for finding in findings}]
    chosen = rng.permutation(len(absent_kinds))[: rng.integers(1, 3)]
    absent = [_pick(rng, _ABSENT[absent_kinds[i]]) for i in chosen]
    if not findings:
        present = [_pick(rng, _NORMAL)]
    return " ".join(present + absent if rng.uniform() < 0.8 else absent + present)


def _describe(rng: np.random.Generator, finding: Finding) -> str:
    template = _pick(rng, _PRESENT[finding.kind])
    size = finding.size
    return template.format(size=size, Size=size.capitalize(), side=finding.side, place=finding.place)


def ask(rng: np.random.Generator, findings: Sequence[Finding]) -> list[Question]:
    """Ask about five questions: two or three closed ones, and up to three open ones."""
    closed = _about_kinds(rng, findings)
    closed.append(_about_normality(findings) if _asks_normality(rng, findings) else _about_side(rng, findings))
    options = _open_questions(rng, findings)
    chosen = sorted(rng.permutation(len(options))[:3])
    return closed + [options[i] for i in chosen]


def _balance(rng: np.random.Generator, able: float) -> bool:
    """Draw the answer of a study that allows yes, so that yes is as frequent as no if only a fraction `able` does."""
    return rng.uniform() < 0.5 / able


def _closed(question: str, yes: bool, found: Sequence[Finding]) -> Question:
    return Question(question, "yes" if yes else "no", "closed", tuple(finding.box for finding in found))


def _about_kinds(rng: np.random.Generator, findings: Sequence[Finding]) -> list[Question]:
    """Ask one question. After a no, ask a second one with the answer yes; after a yes, do the reverse half of the time.

    A normal study (a quarter of all, so half of the answers no) has no finding: yes and no stay equally frequent.
    """
    yes = bool(findings) and _balance(rng, _ABNORMAL)
    asked = [_about_kind(rng, findings, yes)]
    if findings and (not yes or rng.uniform() < 0.5):
        asked.append(_about_kind(rng, findings, not yes))
    return asked


def _about_kind(rng: np.random.Generator, findings: Sequence[Finding], yes: bool) -> Question:
    present = sorted({finding.kind for finding in findings})
    kinds = present if yes else [kind for kind in KINDS if kind not in present]
    kind = kinds[rng.integers(len(kinds))]
    found = [finding for finding in findings if finding.kind == kind]
    if kind == "cardiomegaly":
        if rng.uniform() < 0.3:
            return _closed("Is the heart size normal?", not yes, found)
        return _closed(_pick(rng, ("Is the heart enlarged?", "Is there cardiomegaly?")), yes, found)
    article = "an" if _NOUN[kind][0] in "aeiou" else "a"
    noun = _NOUN[kind] if kind == "consolidation" else f"{article} {_NOUN[kind]}"
    return _closed(_pick(rng, (f"Is there {noun}?", f"Does this film show {noun}?")), yes, found)


def _about_side(rng: np.random.Generator, findings: Sequence[Finding]) -> Question:
    """Ask about a kind on one side. In half of the questions with the answer no, it is present on the other side."""
    sided = [finding for finding in findings if finding.side]
    sites: set[tuple[Kind, Side]] = {(finding.kind, finding.side) for finding in sided}
    everywhere: list[tuple[Kind, Side]] = [(kind, side) for kind in KINDS if kind != "cardiomegaly" for side in SIDES]
    yes = bool(sided) and _balance(rng, _SIDED)
    mirrored = [
        (kind, side) for kind, side in everywhere if (kind, side) not in sites and (kind, _other(side)) in sites
    ]
    if yes:
        options = sorted(sites)
    elif mirrored and rng.uniform() < 0.7:
        options = mirrored
    else:
        options = [site for site in everywhere if site not in sites]
    kind, side = options[rng.integers(len(options))]
    found = [finding for finding in sided if (finding.kind, finding.side) == (kind, side)]
    noun = "consolidation" if kind == "consolidation" else f"a {_NOUN[kind]}"
    place = f"in the {side} lung" if kind in ("nodule", "consolidation") else f"on the {side} side"
    return _closed(f"Is there {noun} {place}?", yes, found)


def _asks_normality(rng: np.random.Generator, findings: Sequence[Finding]) -> bool:
    """Half of the normal studies are asked about normality, and the same number of abnormal ones."""
    chance = 0.5 if not findings else 0.5 * (1 - _ABNORMAL) / _ABNORMAL
    return rng.uniform() < chance


def _about_normality(findings: Sequence[Finding]) -> Question:
    return _closed("Is this study normal?", not findings, findings)


def _other(side: Side) -> Side:
    return "left" if side == "right" else "right"


def _open_questions(rng: np.random.Generator, findings: Sequence[Finding]) -> list[Question]:
    """All open questions that have exactly one correct answer."""
    if not findings:
        return [Question("What abnormality is seen?", "none", "open", ())]
    questions: list[Question] = []
    kinds = [finding.kind for finding in findings]
    for finding in findings:
        boxes = (finding.box,)
        noun = _NOUN[finding.kind]
        if finding.side:
            where = f"What abnormality is seen in the {finding.place}?"
            questions.append(Question(where, finding.kind, "open", boxes))
            if kinds.count(finding.kind) == 1:
                questions.append(Question(f"Which side is the {noun} on?", finding.side, "open", boxes))
        if kinds.count(finding.kind) == 1 and finding.kind in ("nodule", "consolidation"):
            where = _pick(rng, (f"Where is the {noun}?", f"In which zone is the {noun}?"))
            questions.append(Question(where, finding.place, "open", boxes))
    if len(findings) == 1:
        only = findings[0]
        questions.append(Question("What abnormality is seen?", only.kind, "open", (only.box,)))
    return questions
