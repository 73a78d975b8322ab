"""Correctness of short answers."""

from __future__ import annotations

import regex

from medalign.evaluation.metrics.tokens import UNSPACED, normalize

ARTICLES = frozenset({"a", "an", "the"})
YES_NO = frozenset({"yes", "no"})

_LETTER = r"[\p{L}\p{M}\p{N}]"
_LETTERS = rf"[{_LETTER}--[{UNSPACED}]]+"
_WORD = regex.compile(rf"(?V1)\d+(?:[.,]\d+)+|(?=[{_LETTER}&&[{UNSPACED}]])\X|{_LETTERS}(?:'{_LETTERS})*")
SIGNATURE = "case:lower|tok:unicode|articles:no|yesno:en+zh+ja"  # the rules of this file, for scores.json

# Chinese and Japanese write yes and no in several ways, with or without a particle or a polite verb. Excluded are
# longer words that begin alike: "cannot be judged", "unclear", "in contrast", "whether".
_PHRASES = {
    "no": regex.compile(
        r"(?:(?:不是|不对|不存在|没有|没|否|无(?!法)|不$)的?|いいえ|いえ|ありません|ないです|ない|違います)"
    ),
    "yes": regex.compile(r"(?:(?:是(?!否)|对(?![比于称照])|有|存在)的?|はい|ええ|そうです|あります|ある)"),
}


def words(text: str) -> list[str]:
    """Split a text into lowercase words without punctuation and articles. Decimal numbers are not split.

    Scripts without spaces between words are split into characters. A text that consists only of articles keeps them,
    because "A" may be the letter of a choice.
    """
    found = _WORD.findall(normalize(text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [word for word in found if word not in ARTICLES] or found


def exact(prediction: str, reference: str) -> bool:
    """Return whether both texts have the same words in the same order. Texts without words must be equal."""
    expected = words(reference)
    return words(prediction) == expected and bool(expected or prediction.strip() == reference.strip())


def yes_or_no(reference: str) -> str | None:
    """Return "yes" or "no" if a reference means this in English, Chinese or Japanese, otherwise None.

    In English the first word decides. In Chinese and Japanese the whole reference must mean yes or no.
    """
    found = words(reference)
    if found[:1] in (["yes"], ["no"]):
        return found[0]
    text = "".join(found)
    return next((meaning for meaning, one in _PHRASES.items() if regex.fullmatch(f"{one.pattern}+", text)), None)


def given_yes_or_no(prediction: str) -> str | None:
    """Return the first yes or no of an answer: any word in English, the beginning in Chinese and Japanese."""
    found = words(prediction)
    text = "".join(found)
    english = next((word for word in found if word in YES_NO), None)
    return english or next((meaning for meaning, one in _PHRASES.items() if one.match(text)), None)


def closed_correct(prediction: str, reference: str) -> bool:
    """Return whether the answer to a closed question is correct.

    If the reference is yes or no, only the first yes or no in the prediction counts: "There is no effusion." counts
    as no. Any other choice must match exactly after normalization.
    """
    expected = yes_or_no(reference)
    return exact(prediction, reference) if expected is None else given_yes_or_no(prediction) == expected


def open_recall(prediction: str, reference: str) -> float:
    """Return the fraction of the reference's words that occur anywhere in the prediction, in [0, 1].

    This is the recall for open questions in LLaVA-Med's evaluation, with one difference: there, a matched word counts
    as often as it occurs in the prediction, so that repetition raises the score. Here it counts as often as it occurs
    in the reference.
    """
    expected = words(reference)
    if not expected:
        return float(exact(prediction, reference))
    found = set(words(prediction))
    return sum(word in found for word in expected) / len(expected)
