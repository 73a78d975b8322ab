"""Long texts: how near is a report to its reference?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import regex

from medalign.evaluation.metrics.tokens import rouge_tokens, separable, separate

_OTHER_LETTER = regex.compile(r"(?V1)[\p{L}--[A-Za-z]]")


class Bleu(NamedTuple):
    """BLEU-4 of a corpus in sacrebleu's points, 0 to 100 (case kept, exponential smoothing)."""

    points: float
    low: float  # 2.5 and 97.5 % quantiles of the bootstrap over texts
    high: float
    signature: str  # sacrebleu's, of how it was counted


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The points of `signed_bleu`."""
    return signed_bleu(predictions, references, resamples=0).points


def signed_bleu(predictions: Sequence[str], references: Sequence[str], resamples: int = 1000) -> Bleu:
    """BLEU with its interval and its signature; without resampling, the interval is (nan, nan).

    The tokens are those of 13a after `tokens.separate`, which changes nothing in English. Where the references have
    something to separate, the signature says `tok:13a+characters`. Standard BLEU is 0 for a corpus without any text of
    four tokens. That stays so for references in ASCII letters; for others the n-grams that exist count (`eff:yes`).
    A corpus that equals its references is 100 in every script, however short its texts are.
    """
    from sacrebleu.metrics import BLEU

    others = any(map(_OTHER_LETTER.search, references))
    metric = BLEU(tokenize="13a", effective_order=others)
    pairs = zip(map(separate, predictions), map(separate, references), strict=True)
    found = [metric.corpus_score([text], [[wanted]]) for text, wanted in pairs]
    counts_SK = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found])

    def points(counts_SK: np.ndarray) -> float:
        *counts, given, wanted = counts_SK.sum(0).tolist()
        right, total = counts[:4], counts[4:]
        equal = right == total and given == wanted  # standard BLEU has no other corpus of this kind but for 0 or 100
        return float(BLEU.compute_bleu(right, total, given, wanted, "exp", effective_order=others or equal).score)

    draw = np.random.default_rng(0)  # the same texts give the same interval
    drawn = [points(counts_SK[draw.integers(0, len(found), len(found))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
    signature = str(metric.get_signature())
    if any(map(separable, references)):
        signature = signature.replace("|tok:13a|", "|tok:13a+characters|")
    return Bleu(points(counts_SK), float(low), float(high), signature)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F1 of one report, in [0, 1]: the longest common subsequence of `tokens.rouge_tokens`, not stemmed."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


def rouge_signature() -> str:
    """How `rouge_l` counts, in the form of sacrebleu's signatures."""
    return f"case:lower|tok:unicode|stem:no|version:{version('rouge-score')}"


@cache
def _scorer() -> Any:
    # Imported on first use: it brings nltk along, which takes a second.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Unicode(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return rouge_tokens(text)

    return RougeScorer(["rougeL"], tokenizer=Unicode())
