"""Long texts: how near is a report to its reference?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole corpus in sacrebleu's points, 0 to 100 (case kept, 13a tokens, exponential smoothing)."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F1 of one report, in [0, 1]: the longest common subsequence of lower-cased words, not stemmed."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    # Imported on first use: it brings nltk along, which takes a second.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
