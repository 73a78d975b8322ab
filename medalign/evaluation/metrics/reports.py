"""Similarity of reports and their references: BLEU and ROUGE-L."""

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
    """Corpus BLEU-4 in sacrebleu's points, 0 to 100 (case-sensitive, exponential smoothing)."""

    points: float
    low: float  # 2.5 and 97.5 % quantiles of the bootstrap over texts
    high: float
    signature: str  # sacrebleu's signature of the settings


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the points of `bleu_with_interval`."""
    return bleu_with_interval(predictions, references, resamples=0).points


def bleu_with_interval(predictions: Sequence[str], references: Sequence[str], resamples: int = 1000) -> Bleu:
    """Compute BLEU with its bootstrap interval and its signature.

    The tokenizer is 13a, applied after `tokens.separate`, which does not change English text. If `separate` changes
    the references, the signature contains `tok:13a+characters`. Standard BLEU is 0 for a corpus in which no text has
    four tokens. This also holds here for references in ASCII letters; for others, only n-gram orders that occur count
    (`eff:yes`). A corpus that equals its references has 100 points in every script, however short its texts are.

    Args:
        predictions: texts to score.
        references: one reference per prediction.
        resamples: number of bootstrap samples; with 0, the interval is (nan, nan).
    """
    others = has_other_letters(references)
    counts_SK = bleu_counts(predictions, references)
    samples = len(counts_SK)
    draw = np.random.default_rng(0)  # fixed seed: the same texts give the same interval
    drawn = [bleu_points(counts_SK[draw.integers(0, samples, samples)].sum(0), others) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
    signature = str(_bleu(others).get_signature())
    if any(map(separable, references)):
        signature = signature.replace("|tok:13a|", "|tok:13a+characters|")
    return Bleu(bleu_points(counts_SK.sum(0), others), float(low), float(high), signature)


def has_other_letters(references: Sequence[str]) -> bool:
    """Return whether any reference has letters other than ASCII: for these, only n-gram orders that occur count."""
    return any(map(_OTHER_LETTER.search, references))


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return what BLEU counts in each text, int64 [S, 10]: matching n-grams, n-grams (orders 1 to 4), and both lengths.

    Args:
        predictions: texts to score.
        references: one reference per prediction.
    """
    metric = _bleu(has_other_letters(references))
    pairs = zip(map(separate, predictions), map(separate, references), strict=True)
    found = [metric.corpus_score([text], [[reference]]) for text, reference in pairs]
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found])


def bleu_points(counts_K: np.ndarray, others: bool, order: int = 4) -> float:
    """Return the points of a corpus.

    Args:
        counts_K: the sum of `bleu_counts` over its texts.
        others: `has_other_letters` of its references.
        order: the longest n-grams that count.
    """
    *counts, length, reference_length = map(int, counts_K)
    correct, total = counts[:4][:order], counts[4:][:order]
    equal = correct == total and length == reference_length  # standard BLEU of such a corpus is 0 or 100
    result = type(_bleu(others)).compute_bleu(
        correct, total, length, reference_length, "exp", effective_order=others or equal, max_ngram_order=order
    )
    return float(result.score)


@cache
def _bleu(others: bool) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="13a", effective_order=others)


def rouge_l(prediction: str, reference: str) -> float:
    """Compute the ROUGE-L F1 of one report, in [0, 1], on the tokens of `tokens.rouge_tokens`, without stemming."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


def rouge_signature() -> str:
    """Return the settings of `rouge_l` in the format of sacrebleu's signatures."""
    return f"case:lower|tok:unicode|stem:no|version:{version('rouge-score')}"


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=unicode_tokenizer())


def unicode_tokenizer() -> Any:
    """Return the tokenizer of `tokens.rouge_tokens` in the form of rouge-score."""
    # Imported on first use, because it imports nltk, which takes a second.
    from rouge_score.tokenizers import Tokenizer

    class Unicode(Tokenizer):  # type: ignore[misc]  # sacrebleu has no types
        def tokenize(self, text: str) -> list[str]:
            return rouge_tokens(text)

    return Unicode()
