"""Short answers: when is one right?"""

from __future__ import annotations

import regex

from medalign.evaluation.metrics.tokens import UNSPACED, normalize

ARTICLES = frozenset({"a", "an", "the"})
YES_NO = frozenset({"yes", "no"})

_LETTER = r"[\p{L}\p{M}\p{N}]"
_LETTERS = rf"[{_LETTER}--[{UNSPACED}]]+"
_WORD = regex.compile(rf"(?V1)\d+(?:[.,]\d+)+|(?=[{_LETTER}&&[{UNSPACED}]])\X|{_LETTERS}(?:'{_LETTERS})*")
SIGNATURE = "case:lower|tok:unicode|articles:no"  # how `words` counts, for scores.json


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation and articles; decimal numbers stay whole.

    Scripts without spaces between words give characters. A text of articles only keeps them: "A" may be the letter
    of a choice.
    """
    found = _WORD.findall(normalize(text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [word for word in found if word not in ARTICLES] or found


def exact(prediction: str, reference: str) -> bool:
    """The same words in the same order."""
    return words(prediction) == words(reference)


def is_yes_no(reference: str) -> bool:
    """Whether the reference answers with yes or no: its first word is one of them."""
    return words(reference)[:1] in (["yes"], ["no"])


def closed_correct(prediction: str, reference: str) -> bool:
    """A closed question's answer.

    Where the reference says yes or no, the first yes or no in the prediction counts and the rest does not: "There
    is no effusion." says no. Any other choice must match exactly, after normalization.
    """
    if is_yes_no(reference):
        said = next((word for word in words(prediction) if word in YES_NO), None)
        return said == words(reference)[0]
    return exact(prediction, reference)


def open_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction has, in [0, 1], wherever they stand.

    The "recall" of LLaVA-Med's evaluation for open questions, with one difference: there, a matched word counts as
    often as the prediction repeats it, which lets repetition raise the score; here it counts as often as the
    reference has it.
    """
    wanted = words(reference)
    if not wanted:
        return float(not words(prediction))
    given = set(words(prediction))
    return sum(word in given for word in wanted) / len(wanted)
