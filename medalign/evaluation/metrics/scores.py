"""The scores of a set of predictions.

| key | meaning | group |
| --- | --- | --- |
| n | predictions | all |
| closed_n, closed_accuracy | closed questions, fraction answered correctly | vqa, closed |
| closed_majority | score of always giving the most common closed answer | vqa, closed |
| open_n, open_recall, open_exact | open questions, recall of words, fraction of exact answers | vqa, open |
| report_n, bleu, rouge_l | reports, corpus BLEU (0 to 100), mean ROUGE-L F1 | report |
| bleu_13a_1 and others | BLEU and ROUGE in other variants; see `variants` | report |
| grounding_n, attention_inside, box_area | samples with boxes, mean attention inside, mean area | boxes |
| ungrounded | samples whose boxes are all outside the image; no score includes them | boxes |
| pointing_n, pointing_hits | samples with a pointing result, fraction of hits | boxes |
| pointing_chance | score of pointing at random, if known | boxes |
| box_ap, box_iou and others | how well the attention outlines the boxes; see `localization` | boxes |
| conditional_n and others | whether the attention follows the question; see `conditional` | boxes |

Reports also have the scores of the findings that they state (`findings`).

answers_signature, bleu_signature and rouge_l_signature describe the tokenization and the versions of the libraries.
Scores with different signatures cannot be compared.

Scores by other published rules are in `rules`, with rules_signature. `by` has the scores of questions for each value
of question_type, finding and modality, if the annotations have them ("" for questions without a value).

Fractions are in [0, 1]. BLEU and means over samples also have NAME_low and NAME_high, a 95 % bootstrap interval. Counts
are always present; the scores of a group without samples are omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from medalign.errors import DataError
from medalign.evaluation.metrics import rules
from medalign.evaluation.metrics.answers import (
    SIGNATURE,
    closed_correct,
    exact,
    given_yes_or_no,
    open_recall,
    words,
    yes_or_no,
)
from medalign.evaluation.metrics.conditional import conditional
from medalign.evaluation.metrics.findings import findings_scores
from medalign.evaluation.metrics.intervals import RESAMPLES, mean
from medalign.evaluation.metrics.localization import boxed_cases, localization
from medalign.evaluation.metrics.predictions import LENGTH, Prediction
from medalign.evaluation.metrics.reports import bleu_with_interval, rouge_l, rouge_signature
from medalign.evaluation.metrics.variants import variants
from medalign.geometry import PatchGrid

Scores = dict[str, Any]  # numbers, and signatures as text


def score(rows: Sequence[Prediction], grid: PatchGrid | None = None) -> Scores:
    """Compute all scores of the table above.

    Args:
        rows: the predictions.
        grid: the grid of their attention; without it, there are no scores of `localization` and `conditional`.

    Raises:
        DataError: a task or an answer type is not valid, or the attention does not fit the grid.
    """
    groups: dict[str, list[Prediction]] = {"closed": [], "open": [], "report": []}
    for row in rows:
        groups[group(row)].append(row)
    return {
        "n": len(rows),
        **_closed(groups["closed"]),
        **_open(groups["open"]),
        **_report(groups["report"]),
        **_grounding(rows),
        **({} if grid is None else localization("box", boxed_cases(rows, grid)) | conditional(rows, grid)),
        **({"answers_signature": SIGNATURE} if groups["closed"] or groups["open"] else {}),
        **_by_rules(groups["closed"], groups["open"]),
        **_by_attribute(groups["closed"] + groups["open"]),
    }


def group(row: Prediction) -> str:
    """Return "closed", "open" or "report". A question of unknown type is closed if its reference is yes or no.

    Raises:
        DataError: the task or the answer type is not valid.
    """
    if row.task == "report":
        return "report"
    if row.task == "vqa" and row.answer_type in ("closed", "open"):
        return row.answer_type
    if row.task == "vqa" and row.answer_type == "":
        return "closed" if yes_or_no(row.answer) else "open"
    raise DataError(
        f"prediction {row.key!r} has task {row.task!r} and answer_type {row.answer_type!r}; "
        "the task must be vqa or report, and the answer type closed, open or empty"
    )


def correctness(row: Prediction) -> float:
    """Return the correctness of one prediction, in [0, 1]: accuracy, recall or ROUGE-L, depending on its group."""
    measure = {"closed": closed_correct, "open": open_recall, "report": rouge_l}[group(row)]
    return float(measure(row.prediction, row.answer))


def _closed(rows: Sequence[Prediction]) -> Scores:
    scores: Scores = {"closed_n": len(rows)}
    if rows:
        answers = Counter(yes_or_no(r.answer) or " ".join(words(r.answer)) for r in rows)
        scores |= mean("closed_accuracy", [closed_correct(r.prediction, r.answer) for r in rows])
        scores["closed_majority"] = answers.most_common(1)[0][1] / len(rows)
    return scores


def _open(rows: Sequence[Prediction]) -> Scores:
    return {
        "open_n": len(rows),
        **mean("open_recall", [open_recall(r.prediction, r.answer) for r in rows]),
        **mean("open_exact", [exact(r.prediction, r.answer) for r in rows]),
    }


def _by_rules(closed: Sequence[Prediction], others: Sequence[Prediction]) -> Scores:
    """Return the scores of the table in `rules`."""
    asked = [*closed, *others]
    if not asked:
        return {}
    scores = mean("closed_official", [rules.official_correct(r.prediction, r.answer) for r in closed])
    if yes_no := [r for r in closed if yes_or_no(r.answer)]:
        missing = [rules.unparseable(r.prediction) for r in yes_no]
        scores |= {"yes_no_n": len(yes_no), "yes_no_unparseable": float(np.mean(missing))}
        scores |= rules.pope_scores([(r.prediction, r.answer) for r in yes_no])
        denied = [given_yes_or_no(r.prediction) == "yes" for r in yes_no if yes_or_no(r.answer) == "no"]
        scores |= {"false_yes_n": len(denied), **mean("false_yes_of_no", denied)}
    scores |= _choices(asked) | mean("open_f1", [rules.token_f1(r.prediction, r.answer) for r in others])
    scores["answers_empty_share"] = float(np.mean([r.empty for r in asked]))
    if all(r.finish_reason for r in asked):
        scores["answers_cut_share"] = float(np.mean([r.finish_reason == LENGTH for r in asked]))
    return scores | {"rules_signature": rules.SIGNATURE}


def _choices(rows: Sequence[Prediction]) -> Scores:
    """Return the scores of multiple-choice questions. Without the reference among its options, a question has none."""
    asked = [(r, expected) for r in rows if (expected := rules.reference_choice(r.answer, r.options)) is not None]
    if not asked:
        return {}
    letters = [rules.chosen_by_letter(r.prediction, r.options) for r, _ in asked]
    texts = [rules.chosen_by_text(r.prediction, r.options) for r, _ in asked]
    either = [rules.chosen(r.prediction, r.options) for r, _ in asked]
    scores: Scores = {"choice_n": len(asked)}
    for name, chosen in (("choice_accuracy", either), ("choice_letter", letters), ("choice_text", texts)):
        scores |= mean(name, [one == expected for one, (_, expected) in zip(chosen, asked, strict=True)])
    return scores | {"choice_unparseable": float(np.mean([one is None for one in either]))}


def _by_attribute(rows: Sequence[Prediction]) -> Scores:
    """Return the scores of questions by question type, finding and modality, for those that any row has."""
    found: dict[str, dict[str, Scores]] = {}
    for name in ("question_type", "finding", "modality"):
        values = sorted({getattr(r, name) for r in rows})
        if any(values):
            parts = {value: [r for r in rows if getattr(r, name) == value] for value in values}
            found[name] = {value: _questions(part) for value, part in parts.items()}
    return {"by": found} if found else {}


def _questions(rows: Sequence[Prediction]) -> Scores:
    kinds = {name: [r for r in rows if group(r) == name] for name in ("closed", "open")}
    return {"n": len(rows), **_closed(kinds["closed"]), **_open(kinds["open"])}


def _report(rows: Sequence[Prediction]) -> Scores:
    scores: Scores = {"report_n": len(rows)}
    if rows:
        found = bleu_with_interval([r.prediction for r in rows], [r.answer for r in rows], RESAMPLES)
        scores |= {"bleu": found.points, "bleu_low": found.low, "bleu_high": found.high}
        scores |= {"bleu_signature": found.signature, "rouge_l_signature": rouge_signature()}
        scores |= variants([r.prediction for r in rows], [r.answer for r in rows]) | findings_scores(rows)
    return scores | mean("rouge_l", [rouge_l(r.prediction, r.answer) for r in rows])


def _grounding(rows: Sequence[Prediction]) -> Scores:
    inside = [
        (r.attention_inside, r.box_area) for r in rows if r.attention_inside is not None and r.box_area is not None
    ]
    hits = [r.pointing_hit for r in rows if r.pointing_hit is not None]
    chances = [r.pointing_chance for r in rows if r.pointing_chance is not None]
    return {
        "grounding_n": len(inside),
        **mean("attention_inside", [a for a, _ in inside]),
        **({"box_area": float(np.mean([area for _, area in inside]))} if inside else {}),
        "ungrounded": sum(bool(r.boxes) and r.attention is not None and r.attention_inside is None for r in rows),
        "pointing_n": len(hits),
        **mean("pointing_hits", hits),
        **({"pointing_chance": float(np.mean(chances))} if chances else {}),
    }
