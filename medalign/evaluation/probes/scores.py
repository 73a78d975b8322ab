"""The scores of probes.

Of a probe that changes the condition (`CHANGED`), on the questions that it asks:

| key | meaning |
| --- | --- |
| n, images_n | questions, and their images |
| accuracy, accuracy_real | closed accuracy and open exact in one, under the probe and on the true image |
| accuracy_drop | accuracy_real - accuracy |
| closed_n, closed_accuracy, closed_accuracy_real, closed_accuracy_drop | the same of closed questions |
| yes_no_n, yes_share, yes_share_real | share of yes, of questions whose reference is yes or no |
| same_share | share of answers with the same words as the one on the true image |

Of POPE's questions: n, images_n, accuracy, yes_share, false_yes_of_no, false_no_of_yes, unparseable by the first whole
word "yes" or "no", and the scores of `rules.pope_scores` by POPE's rule.

Of questions that presuppose a finding: n and accuracy of those whose finding is absent (an answer is right if it denies
the finding, see `rejects`), present_n and rejected_of_present of those whose finding is there.

Intervals (NAME_low, NAME_high) are 95 % of the bootstrap over images. All probes have not_asked, which says why samples
or images were left out, unreadable, and empty_share and truncated of their answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medalign.errors import DataError
from medalign.evaluation.findings import chest_labeler
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.metrics.answers import closed_correct, exact, given_yes_or_no, yes_or_no
from medalign.evaluation.metrics.intervals import ratio
from medalign.evaluation.metrics.rules import pope_scores
from medalign.evaluation.metrics.scores import group
from medalign.evaluation.probes.catalog import CHANGED, NOWHERE, PRESUPPOSED

Pairs = list[tuple[Prediction, Prediction]]  # on the true image, and under the probe


def probe_scores(name: str, rows: Sequence[Prediction], real: Sequence[Prediction]) -> dict[str, Any]:
    """Compute the scores of a probe.

    Args:
        name: of the probe.
        rows: its answers.
        real: the answers of the evaluation.

    Raises:
        DataError: a question of the probe is not among them.
    """
    if not rows:
        return {"n": 0}
    if name in CHANGED:
        asked = {(row.folder, row.key): row for row in real}
        if lost := next((row.key for row in rows if (row.folder, row.key) not in asked), None):
            raise DataError(
                f"the answers to probe {name} have {lost!r}, but the predictions of the evaluation do not; evaluate "
                f"again with --overwrite --probes {name}"
            )
        scores = _changed([(asked[row.folder, row.key], row) for row in rows])
    else:
        scores = _presupposed(rows) if name == PRESUPPOSED else _pope(rows)
    empty = float(np.mean([row.empty for row in rows]))
    return {**scores, "empty_share": empty, "truncated": sum(row.truncated for row in rows)}


def _changed(pairs: Pairs) -> dict[str, Any]:
    scores: dict[str, Any] = {"n": len(pairs), "images_n": len({_image(one) for one, _ in pairs})}
    scores |= _drop("accuracy", pairs)
    closed = [pair for pair in pairs if group(pair[0]) == "closed"]
    scores |= {"closed_n": len(closed)} | (_drop("closed_accuracy", closed) if closed else {})
    yes_no = [pair for pair in pairs if yes_or_no(pair[0].answer)]
    scores["yes_no_n"] = len(yes_no)
    if yes_no:
        shares = [np.mean([_says_yes(row) for row in rows]) for rows in zip(*yes_no, strict=True)]
        scores |= {"yes_share": float(shares[1]), "yes_share_real": float(shares[0])}
    return scores | {"same_share": float(np.mean([exact(row.prediction, one.prediction) for one, row in pairs]))}


def _drop(name: str, pairs: Pairs) -> dict[str, float]:
    """Return the accuracy on both sides and its drop, with the interval over images."""
    right = [(_right(one), _right(row)) for one, row in pairs]
    cases: defaultdict[str, list[int]] = defaultdict(list)
    for (one, _), (real, probed) in zip(pairs, right, strict=True):
        cases[_image(one)].append(real - probed)
    here, there = (float(np.mean([pair[side] for pair in right])) for side in (1, 0))
    drop = ratio(f"{name}_drop", [(sum(each), len(each)) for each in cases.values()])
    return {name: here, f"{name}_real": there, **drop}


def _right(row: Prediction) -> int:
    return int((closed_correct if group(row) == "closed" else exact)(row.prediction, row.answer))


def _pope(rows: Sequence[Prediction]) -> dict[str, Any]:
    given = [(row, given_yes_or_no(row.prediction), yes_or_no(row.answer)) for row in rows]
    return {
        **_by_image("accuracy", [(row, said == true) for row, said, true in given]),
        "yes_share": float(np.mean([said == "yes" for _, said, _ in given])),
        "false_yes_of_no": float(np.mean([said == "yes" for _, said, true in given if true == "no"])),
        "false_no_of_yes": float(np.mean([said == "no" for _, said, true in given if true == "yes"])),
        "unparseable": float(np.mean([said is None for _, said, _ in given])),
        **pope_scores([(row.prediction, row.answer) for row in rows]),
    }


def _presupposed(rows: Sequence[Prediction]) -> dict[str, Any]:
    absent = [(row, rejects(row.prediction, row.finding)) for row in rows if row.answer == NOWHERE]
    present = [rejects(row.prediction, row.finding) for row in rows if row.answer != NOWHERE]
    scores = _by_image("accuracy", absent) if absent else {"n": 0}
    scores |= {"present_n": len(present)}
    return scores | ({"rejected_of_present": float(np.mean(present))} if present else {})


def rejects(answer: str, finding: str) -> bool:
    """Return whether an answer to a question that presupposes a finding says that it is not there.

    An answer that names the finding must deny it by the rules of `evaluation.findings`. Another answer must have a word
    that denies ("none", "not seen", "no").
    """
    labeler = chest_labeler()
    label = labeler.label(answer).get(finding)
    if label is not None:
        return label.assertion == "absent"
    return given_yes_or_no(answer) == "no" or labeler.denies_something(answer)


def _by_image(name: str, values: Sequence[tuple[Prediction, bool]]) -> dict[str, Any]:
    images: defaultdict[str, list[bool]] = defaultdict(list)
    for row, value in values:
        images[_image(row)].append(value)
    found = ratio(name, [(sum(each), len(each)) for each in images.values()])
    return {"n": len(values), "images_n": len(images), **found}


def _says_yes(row: Prediction) -> bool:
    return given_yes_or_no(row.prediction) == "yes"


def _image(row: Prediction) -> str:
    return row.image or f"{row.folder}/{row.key}"


def facts_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what only the evaluation knows about a probe: why samples were left out, and how many are unreadable."""
    return {name: scores[name] for name in ("unreadable", "not_asked") if name in scores}
