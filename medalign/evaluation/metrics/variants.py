"""BLEU and ROUGE of reports in the variants that publications use. The variant is in the key.

| key | meaning |
| --- | --- |
| bleu_13a_1 to bleu_13a_4 | sacrebleu's corpus BLEU of orders 1 to N, tokenizer 13a, case kept, 0 to 100 |
| bleu_13a_lc_1 to bleu_13a_lc_4 | the same in lower case |
| rouge_1, rouge_2 | mean F1 of rouge-score, without stemming, in [0, 1] |
| rouge_1_stem, rouge_2_stem, rouge_l_stem | the same with Porter's stemmer |

`bleu` is bleu_13a_4 with its interval, and `rouge_l` the third one without stemming. Other scripts than Latin are split
as for these. The stemmer knows ASCII only: for other references, its scores are not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from medalign.evaluation.metrics.intervals import mean
from medalign.evaluation.metrics.reports import bleu_counts, bleu_points, has_other_letters, unicode_tokenizer

ORDERS = (1, 2, 3, 4)
_STEMMED = ("rouge_1_stem", "rouge_2_stem", "rouge_l_stem")


def variants(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Compute the scores of the table above.

    Args:
        predictions: reports, at least one.
        references: one reference per prediction.

    Returns:
        The scores, their signatures and, under `not_available`, the reason for each score that is missing.
    """
    others = has_other_letters(references)
    scores: dict[str, Any] = {}
    for name, fold in (("bleu_13a", str), ("bleu_13a_lc", str.lower)):
        counts_K = bleu_counts([*map(fold, predictions)], [*map(fold, references)]).sum(0)
        scores |= {f"{name}_{order}": bleu_points(counts_K, others, order) for order in ORDERS}
    pairs = list(zip(predictions, references, strict=True))
    scores |= _rouge(("rouge_1", "rouge_2"), pairs, stem=False)
    if others:
        scores["not_available"] = dict.fromkeys(_STEMMED, "the references are not in ASCII letters, the stemmer's only")
    else:
        scores |= _rouge(_STEMMED, pairs, stem=True)
    scores["rouge_stem_signature"] = f"case:lower|tok:rouge-score|stem:porter|version:{version('rouge-score')}"
    return scores


def _rouge(names: Sequence[str], pairs: Sequence[tuple[str, str]], *, stem: bool) -> dict[str, float]:
    """Return the mean F1 of each of these scores."""
    kinds = ["rouge" + name.split("_")[1].upper() for name in names]
    found = [_scorer(tuple(kinds), stem).score(reference, prediction) for prediction, reference in pairs]
    scores: dict[str, float] = {}
    for name, kind in zip(names, kinds, strict=True):
        scores |= mean(name, [one[kind].fmeasure for one in found])
    return scores


@cache
def _scorer(kinds: tuple[str, ...], stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(kinds, use_stemmer=True) if stem else RougeScorer(kinds, tokenizer=unicode_tokenizer())
