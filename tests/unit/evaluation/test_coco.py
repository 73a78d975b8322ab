"""Scores of reports by COCO's evaluation."""

from __future__ import annotations

import json
import shutil

import pytest

from medalign.__main__ import main
from medalign.evaluation.metrics import Prediction, coco, write_predictions
from medalign.evaluation.metrics.coco import coco_scores, tokenize

REFERENCES = ["The heart is normal. No effusion, no nodule.", "A small nodule in the left upper lobe.", "Clear lungs."]
PREDICTIONS = ["Heart is normal; no effusion.", "A nodule is in the left lobe!", ""]
NAMES = ["coco_bleu", "coco_rouge_l", "coco_cider", "coco_meteor"]


@pytest.fixture
def java() -> None:
    pytest.importorskip("pycocoevalcap", reason="the package pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")


def test_scores_equal_those_of_the_published_pipeline(java):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    whole = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(REFERENCES)})
    assert tokenize(REFERENCES) == [texts[0] for texts in whole.values()]
    assert tokenize(REFERENCES)[0] == "the heart is normal no effusion no nodule"
    found = coco_scores(PREDICTIONS, REFERENCES)
    assert "not_available" not in found and "tok:ptb" in found["coco_signature"]
    given = {0: ["heart is normal no effusion"], 1: ["a nodule is in the left lobe"], 2: [""]}
    expected, _ = Bleu(4).compute_score(whole, given, verbose=0)
    assert [found[f"coco_bleu_{n}"] for n in (1, 2, 3, 4)] == expected
    assert 0 < found["coco_meteor"] < 1 and 0 < found["coco_cider"] < 10
    # longest common subsequences 5 of 5 and of 8, 6 of 7 and of 8, none; F with beta 1.2
    by_hand = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in ((1, 5 / 8), (6 / 7, 6 / 8))]
    assert found["coco_rouge_l"] == pytest.approx(sum(by_hand) / 3)


def test_equal_texts_have_the_highest_scores(java):
    found = coco_scores(REFERENCES[:2], REFERENCES[:2])
    assert found["coco_bleu_4"] == pytest.approx(1) and found["coco_rouge_l"] == pytest.approx(1)
    assert found["coco_meteor"] == pytest.approx(1) and found["coco_cider"] == pytest.approx(10)
    alone = coco_scores(REFERENCES[:1], REFERENCES[:1])
    assert list(alone["not_available"]) == ["coco_cider"] and "coco_cider" not in alone


@pytest.mark.parametrize(("missing", "reason"), [("package", "pycocoevalcap is not"), ("java", "Java is not")])
def test_what_is_missing_is_named_and_never_zero(missing, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(coco, "find_spec", lambda name: None if missing == "package" else object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    row = Prediction("a", "report", "Describe.", REFERENCES[0], "", PREDICTIONS[0])
    write_predictions(tmp_path / "predictions.jsonl", [row])
    assert main(["score", str(tmp_path), "--coco"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found["not_available"]) == NAMES and all(reason in text for text in found["not_available"].values())
    assert not [name for name in found if name.startswith("coco")] and found["rouge_l"] > 0
