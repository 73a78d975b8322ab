"""Rules of published evaluations for short answers, beside those of `answers`, and the scores that use them.

| key | meaning | of |
| --- | --- | --- |
| closed_official | accuracy by `official_correct` | closed questions |
| yes_no_n, yes_no_unparseable | answers without a yes or no, as a fraction | questions whose reference is yes or no |
| pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes | POPE's scores ("yes" is positive) | the same |
| false_yes_n, false_yes_of_no | share of yes by `answers.given_yes_or_no` | questions whose reference is no |
| choice_n, choice_accuracy | accuracy by letter or else by text | questions with options |
| choice_letter, choice_text | accuracy by each rule | the same |
| choice_unparseable | fraction of answers from which neither rule reads an option | the same |
| open_f1 | mean F1 of words | open questions |
| answers_empty_share, answers_cut_share | fraction of answers without text, and cut at the limit | all questions |

A precision or a recall without a single case is omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import regex

from medalign.evaluation.metrics.answers import exact, given_yes_or_no, words, yes_or_no

LETTERS = "ABCDEFGHIJ"
SIGNATURE = "official:substring|pope:first-sentence|choice:same-then-letter-then-text|f1:words"

# A letter that is the whole answer, that a bracket, period or colon follows at the beginning, or that such words as
# "the answer is" introduce. "A nodule" names no letter.
_LETTER = regex.compile(
    rf"^\s*\(?([{LETTERS}])\)?\s*$|^\s*\(?([{LETTERS}])[).:]"
    rf"|\b(?i:answer|option|choice)(?:\s+is)?:?\s*\(?([{LETTERS}])(?=[).:,;]|\s*$)"
)


def official_correct(prediction: str, reference: str) -> bool:
    """Return whether a closed answer is correct by the rule of LLaVA-Med's evaluation, which MedAlign's code uses.

    The prediction must contain "yes" or "no", and the reference, as strings of letters. So "normal", "cannot" and
    "unknown" contain "no", and an answer to a question of left or right is correct only by accident. Both texts are
    normalized by `answers.words`.
    """
    given, expected = " ".join(words(prediction)), " ".join(words(reference))
    return ("yes" in given or "no" in given) and bool(expected) and expected in given


def pope_answer(prediction: str) -> str:
    """Return "yes" or "no" by the rule of POPE (Li et al. 2023).

    The first sentence, up to a period, is "no" if one of its words, separated by spaces and without commas, is "No",
    "not" or "no"; everything else, empty text included, is "yes".
    """
    found = prediction.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(found) else "yes"


def chosen_by_letter(prediction: str, options: Sequence[str]) -> int | None:
    """Return the option whose letter (A for the first one) an answer names, or None."""
    found = _LETTER.search(prediction)
    index = LETTERS.index(next(filter(None, found.groups()))) if found else len(options)
    return index if index < len(options) else None


def chosen_by_text(prediction: str, options: Sequence[str]) -> int | None:
    """Return the only option whose words occur in an answer, one after another, or None.

    An option within a longer one that also occurs ("lung" in "left lung") does not count.
    """
    given = f" {' '.join(words(prediction))} "
    texts = [f" {' '.join(words(option))} " for option in options]
    found = [i for i, text in enumerate(texts) if text.strip() and text in given]
    longest = [i for i in found if not any(texts[i] != texts[j] and texts[i] in texts[j] for j in found)]
    return longest[0] if len(longest) == 1 else None


def chosen(prediction: str, options: Sequence[str]) -> int | None:
    """Return the option that an answer names: the one with exactly its words, else by letter, else by text, or None.

    So "C. difficile" is the option of this name, and not the third one.
    """
    same = [i for i, option in enumerate(options) if exact(prediction, option)]
    if len(same) == 1:
        return same[0]
    letter = chosen_by_letter(prediction, options)
    return chosen_by_text(prediction, options) if letter is None else letter


def reference_choice(reference: str, options: Sequence[str]) -> int | None:
    """Return the option that a reference names by its text or else by its letter, or None."""
    expected = words(reference)
    for i, option in enumerate(options):
        if words(option) == expected:
            return i
    return chosen_by_letter(reference, options)


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words of a prediction, in [0, 1]; a repeated word counts as often as it occurs in both."""
    given, expected = Counter(words(prediction)), Counter(words(reference))
    if not given or not expected:
        return float(exact(prediction, reference))
    return 2 * (given & expected).total() / (given.total() + expected.total())


def pope_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return POPE's scores.

    Args:
        pairs: prediction and reference of questions whose reference is yes or no.
    """
    found = Counter((pope_answer(prediction), yes_or_no(reference)) for prediction, reference in pairs)
    hits = found["yes", "yes"]
    answered_yes, true = hits + found["yes", "no"], hits + found["no", "yes"]
    scores = {"pope_accuracy": (hits + found["no", "no"]) / len(pairs), "pope_yes": answered_yes / len(pairs)}
    if answered_yes:
        scores["pope_precision"] = hits / answered_yes
    if true:
        scores["pope_recall"] = hits / true
    if answered_yes + true:
        scores["pope_f1"] = 2 * hits / (answered_yes + true)
    return scores


def unparseable(prediction: str) -> bool:
    """Return whether an answer to a yes-or-no question contains neither."""
    return given_yes_or_no(prediction) is None
