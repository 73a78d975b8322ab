"""Long texts: how near is a report to its reference?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import regex

from medalign.evaluation.metrics.tokens import rouge_tokens, separable, separate

_OTHER_LETTER = regex.compile(r"(?V1)[\p{L}--[A-Za-z]]")


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole corpus in sacrebleu's points, 0 to 100 (case kept, exponential smoothing)."""
    return signed_bleu(predictions, references)[0]


def signed_bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU and sacrebleu's signature of how it was counted.

    The tokens are those of 13a after `tokens.separate`, which changes nothing in English. Where the references have
    something to separate, the signature says `tok:13a+characters`. Standard BLEU is 0 for a corpus without any text of
    four tokens. That stays so for references in ASCII letters; for others the n-grams that exist count (`eff:yes`).
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="13a", effective_order=any(map(_OTHER_LETTER.search, references)))
    points = float(metric.corpus_score([*map(separate, predictions)], [[*map(separate, references)]]).score)
    signature = str(metric.get_signature())
    if any(map(separable, references)):
        signature = signature.replace("|tok:13a|", "|tok:13a+characters|")
    return points, signature


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
