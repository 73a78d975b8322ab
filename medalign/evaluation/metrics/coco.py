"""Scores of reports as COCO's caption evaluation computes them, by its published code (the package pycocoevalcap).

| key | meaning |
| --- | --- |
| coco_bleu_1 to coco_bleu_4 | corpus BLEU, not smoothed, in [0, 1] |
| coco_rouge_l | mean ROUGE-L F with beta 1.2 |
| coco_cider | CIDEr; 10 for texts that equal their references |
| coco_meteor | METEOR 1.5 with its English paraphrases |

Texts are tokenized by Stanford's PTBTokenizer, in lower case and without punctuation, which needs Java. A score that
cannot be computed is missing and has a reason; it is never 0 for that.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = "pycocoevalcap"
_LIMIT = 600  # seconds for the tokenizer


class Unavailable(Exception):
    """Why a score cannot be computed."""


def coco_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Compute the scores of the table above.

    Args:
        predictions: reports, at least one.
        references: one reference per prediction.

    Returns:
        The scores and `coco_signature`; under `not_available`, the reason for each score that is missing.
    """
    try:
        given, expected = tokenize(predictions), tokenize(references)
    except Unavailable as error:
        return {"not_available": {name: str(error) for name in _SCORERS}}
    texts = {i: [text] for i, text in enumerate(given)}
    targets = {i: [text] for i, text in enumerate(expected)}
    scores: dict[str, Any] = {}
    missing = {}
    for name, scorer in _SCORERS.items():
        try:
            scores |= scorer(targets, texts)
        except Unavailable as error:
            missing[name] = str(error)
    scores["coco_signature"] = f"tok:ptb|case:lower|punctuation:no|version:{version(_PACKAGE)}"
    return scores | ({"not_available": missing} if missing else {})


def tokenize(texts: Sequence[str]) -> list[str]:
    """Return each text as tokens joined by spaces.

    Raises:
        Unavailable: the package or Java is missing, or the tokenizer fails.
    """
    if find_spec(_PACKAGE) is None:
        raise Unavailable("the package pycocoevalcap is not installed: pip install 'medalign[coco]'")
    if shutil.which("java") is None:
        raise Unavailable("Java is not installed, and the tokenizer of COCO's evaluation needs it")
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # One line per text: a form feed, for example, would end a line for Java.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    try:
        found = subprocess.run(command, input=lines.encode(), capture_output=True, check=True, timeout=_LIMIT)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the tokenizer of COCO's evaluation failed: {type(error).__name__}") from error
    tokens = found.stdout.decode().split("\n")[: len(texts)]
    if len(tokens) < len(texts):
        raise Unavailable("the tokenizer of COCO's evaluation returned fewer lines than it was given")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokens]


Texts = dict[int, list[str]]


def _bleu(references: Texts, predictions: Texts) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    points, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    return {f"coco_bleu_{order}": float(value) for order, value in enumerate(points, start=1)}


def _rouge(references: Texts, predictions: Texts) -> dict[str, float]:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"coco_rouge_l": float(Rouge().compute_score(references, predictions)[0])}


def _cider(references: Texts, predictions: Texts) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider

    if len(references) < 2:
        raise Unavailable("CIDEr weighs words by their frequency in the references, and there is only one")
    return {"coco_cider": float(Cider().compute_score(references, predictions)[0])}


def _meteor(references: Texts, predictions: Texts) -> dict[str, float]:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return {"coco_meteor": float(meteor.compute_score(references, predictions)[0])}
    except (OSError, ValueError) as error:  # Java ended, or answered something that is not a number
        raise Unavailable(f"METEOR failed: {type(error).__name__}") from error
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()


_SCORERS: dict[str, Callable[[Texts, Texts], dict[str, float]]] = {
    "coco_bleu": _bleu,
    "coco_rouge_l": _rouge,
    "coco_cider": _cider,
    "coco_meteor": _meteor,
}
