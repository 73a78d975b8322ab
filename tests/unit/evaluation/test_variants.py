"""Variants of BLEU and ROUGE, against the libraries' own calls."""

from __future__ import annotations

import json

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.variants import variants
from medalign.evaluation.scores_file import format_scores

REFERENCES = ["The heart is enlarged. No pleural effusion is seen.", "Small nodules in the LEFT upper zone, 2.5 mm."]
PREDICTIONS = ["Heart enlarged with no effusions seen in the pleural space.", "A small nodule in the left upper zone."]


@pytest.mark.parametrize("predictions", [PREDICTIONS, ["", PREDICTIONS[1]], ["", ""], REFERENCES])
def test_scores_equal_those_of_the_libraries(predictions):
    found = variants(predictions, REFERENCES)
    for order in (1, 2, 3, 4):
        for name, lower in (("bleu_13a", False), ("bleu_13a_lc", True)):
            bleu = sacrebleu.BLEU(max_ngram_order=order, lowercase=lower)
            assert found[f"{name}_{order}"] == pytest.approx(bleu.corpus_score(predictions, [REFERENCES]).score)
    for name, stem in (("rouge_1", False), ("rouge_2", False), ("rouge_l_stem", True), ("rouge_2_stem", True)):
        kind = "rouge" + name.split("_")[1].upper()
        scorer = RougeScorer([kind], use_stemmer=stem)
        pairs = zip(REFERENCES, predictions, strict=True)
        assert found[name] == pytest.approx(sum(scorer.score(*pair)[kind].fmeasure for pair in pairs) / 2)


def test_the_variants_differ_and_two_of_them_are_the_main_scores():
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    found = score([Prediction(str(i), "report", "?", answer, "", given) for i, (given, answer) in enumerate(pairs)])
    assert found["bleu_13a_4"] == found["bleu"] and found["bleu_13a_lc_4"] > found["bleu"]
    assert found["rouge_l_stem"] > found["rouge_l"] and found["bleu_13a_1"] > found["bleu_13a_2"] > found["bleu"]
    assert "stem:porter" in found["rouge_stem_signature"]


def test_what_the_stemmer_does_not_know_is_not_available():
    rows = [Prediction("a", "report", "?", "右肺下叶有结节", "", "右肺有结节")]
    found = json.loads(format_scores(rows, {}, {"not_available": {"coco_cider": "only one"}}))
    assert set(found["not_available"]) == {"rouge_1_stem", "rouge_2_stem", "rouge_l_stem", "coco_cider"}
    assert "rouge_l_stem" not in found and found["rouge_1"] > 0.5 and found["bleu_13a_1"] > 0
