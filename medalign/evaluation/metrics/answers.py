"""Correctness of short answers."""

from __future__ import annotations

import regex

from medalign.evaluation.metrics.tokens import UNSPACED, normalize

ARTICLES = frozenset({"a", "an", "the"})
YES_NO = frozenset({"yes", "no"})

_LETTER = r"[\p{L}\p{M}\p{N}]"
_LETTERS = rf"[{_LETTER}--[{UNSPACED}]]+"
_WORD = regex.compile(rf"(?V1)\d+(?:[.,]\d+)+|(?=[{_LETTER}&&[{UNSPACED}]])\X|{_LETTERS}(?:'{_LETTERS})*")
SIGNATURE = "case:lower|tok:unicode|articles:no"  # rules of `words`, for scores.json


def words(text: str) -> list[str]:
    """Split a text into lowercase words without punctuation and articles. Decimal numbers are not split.

    Scripts without spaces between words are split into characters. A text that consists only of articles keeps them,
    because "A" may be the letter of a choice.
    """
    found = _WORD.findall(normalize(text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [word for word in found if word not in ARTICLES] or found


def exact(prediction: str, reference: str) -> bool:
    """Return whether both texts have the same words in the same order."""
    return words(prediction) == words(reference)


def is_yes_no(reference: str) -> bool:
    """Return whether the first word of the reference is yes or no."""
    return words(reference)[:1] in (["yes"], ["no"])


def closed_correct(prediction: str, reference: str) -> bool:
    """Return whether the answer to a closed question is correct.

    If the reference is yes or no, only the first yes or no in the prediction counts: "There is no effusion." counts
    as no. Any other choice must match exactly after normalization.
    """
    if is_yes_no(reference):
        answer = next((word for word in words(prediction) if word in YES_NO), None)
        return answer == words(reference)[0]
    return exact(prediction, reference)


def open_recall(prediction: str, reference: str) -> float:
    """Return the fraction of the reference's words that occur anywhere in the prediction, in [0, 1].

    This is the recall for open questions in LLaVA-Med's evaluation, with one difference: there, a matched word counts
    as often as it occurs in the prediction, so that repetition raises the score. Here it counts as often as it occurs
    in the reference.
    """
    expected = words(reference)
    if not expected:
        return float(not words(prediction))
    found = set(words(prediction))
    return sum(word in found for word in expected) / len(expected)
