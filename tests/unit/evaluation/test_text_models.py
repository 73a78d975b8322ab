"""Scores by models: BERTScore against a computation of its own, the other packages in the form of fakes."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from medalign.__main__ import main
from medalign.evaluation.metrics import Prediction, write_predictions
from medalign.evaluation.text_models import TextModel, model_scores, scores, worker

REFERENCES = ["no effusion is seen", "a nodule in the left lung", "clear"]
PREDICTIONS = ["effusion seen", "the left lung has a nodule", ""]
LAYER = 2


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT of random weights with the vocabulary of the texts."""
    folder = tmp_path_factory.mktemp("t5-and-others") / "tiny"  # its path is not that of a T5
    folder.mkdir()
    words = sorted({word for text in REFERENCES + PREDICTIONS for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=5 + len(words), **sizes)).save_pretrained(folder)
    return folder


def by_hand(folder: Path, prediction: str, reference: str) -> tuple[float, float, float]:
    """Each token except the special ones is compared with all tokens of the other text."""
    words, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def vectors(text: str) -> torch.Tensor:
        with torch.no_grad():
            found = model(**words(text, return_tensors="pt"), output_hidden_states=True).hidden_states[LAYER][0]
        return torch.nn.functional.normalize(found, dim=-1)

    similarity = vectors(prediction) @ vectors(reference).T
    precision, recall = similarity.amax(1)[1:-1].mean().item(), similarity.amax(0)[1:-1].mean().item()
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_bertscore_equals_its_definition(bert, tmp_path):
    """In float32, in batches: 1e-5. A report without text scores 0."""
    rows = [Prediction(str(i), "report", "?", REFERENCES[i], "", given) for i, given in enumerate(PREDICTIONS)]
    write_predictions(tmp_path / "other.jsonl", rows)
    assert main(["score", str(tmp_path / "other.jsonl"), "--models", f"bertscore={bert}:{LAYER}"]) == 0
    found = json.loads((tmp_path / "other.scores.json").read_text())
    each = [by_hand(bert, given, answer) for given, answer in zip(PREDICTIONS[:2], REFERENCES[:2], strict=True)]
    for place, name in enumerate(("precision", "recall", "f1")):
        assert found[f"bertscore_{name}"] == pytest.approx(sum(one[place] for one in each) / 3, abs=1e-5)
    assert found["bertscore_f1_low"] == 0.0 and "not_available" not in found
    assert found["bertscore_signature"].startswith("model:tiny|layer:2|idf:no|rescaled:no|version:0.3")


class Fake:
    """A scorer of another package: it records how it was made and called."""

    calls: list[Any] = []
    result: Any = None

    def __init__(self, *settings: Any, **named: Any) -> None:
        Fake.calls = [(settings, named)]

    def __call__(self, *texts: Any, **named: Any) -> Any:
        Fake.calls.append((texts, named))
        return Fake.result

    compute_score = __call__


def fake(monkeypatch, tmp_path: Path, module: str, scorer: str, result: Any, files: tuple[str, ...] = ()) -> None:
    found = ModuleType(module)
    found.__spec__ = ModuleSpec(module, None)
    setattr(found, scorer, Fake)
    monkeypatch.setitem(sys.modules, module, found)
    monkeypatch.setattr(worker, "version", lambda package: "2.7.0")
    monkeypatch.chdir(tmp_path)
    Fake.result = result
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()


def job(name: str) -> dict[str, Any]:
    return {"name": name, "model": "x", "layers": None, "predictions": PREDICTIONS, "references": REFERENCES}


def test_chexbert_is_called_as_its_package_asks(monkeypatch, tmp_path):
    report = {"micro avg": {"f1-score": 0.5}, "macro avg": {"f1-score": 0.25}}
    files = ("chexbert/chexbert.pth", "bert-base-uncased/config.json")
    fake(monkeypatch, tmp_path, "f1chexbert", "F1CheXbert", (0.75, [1], report, report), files)
    found = worker.compute(job("chexbert"))
    assert Fake.calls[1] == ((), {"hyps": PREDICTIONS, "refs": REFERENCES})
    assert found["of_all"]["chexbert_accuracy_5"] == 0.75 and found["of_all"]["chexbert_macro_f1_14"] == 0.25
    assert found["signature"] == "labels:present-or-uncertain|version:2.7.0|transformers:2.7.0"


def test_radgraph_is_called_as_its_package_asks(monkeypatch, tmp_path):
    rewards = ([1.0, 0.5, 0.0], [0.5, 0.5, 0.0], [0.25, 0.5, 0.0])
    fake(monkeypatch, tmp_path, "radgraph", "F1RadGraph", (0, rewards, [], []), ("radgraph-xl/config.json",))
    found = worker.compute(job("radgraph"))
    made = {"reward_level": "all", "model_type": "radgraph-xl", "model_cache_dir": str(tmp_path)}
    assert Fake.calls == [((), made), ((), {"refs": REFERENCES, "hyps": PREDICTIONS})]
    assert found["of_each"]["radgraph_partial"] == [0.5, 0.5, 0.0]


def test_ratescore_gets_one_pair_per_call_and_a_report_without_sentences_scores_0(monkeypatch, tmp_path):
    files = ("RaTE-NER-Deberta/config.json", "BioLORD-2023-C/config.json")
    fake(monkeypatch, tmp_path, "RaTEScore", "RaTEScore", None, files)
    monkeypatch.setattr(Fake, "compute_score", lambda self, given, expected: [0.5] if given[0] else [])
    found = worker.compute(job("ratescore"))
    assert found["of_each"]["ratescore"] == [0.5, 0.5, 0.0]
    assert Fake.calls == [(("RaTE-NER-Deberta", "BioLORD-2023-C"), {"use_gpu": torch.cuda.is_available()})]


@pytest.mark.parametrize(
    ("name", "module", "scorer", "reason"),
    [
        ("chexbert", "f1chexbert", "F1CheXbert", "no chexbert/chexbert.pth and no bert-base-uncased/config.json"),
        ("radgraph", "radgraph", "F1RadGraph", "no radgraph-xl/config.json"),
        ("ratescore", "RaTEScore", "RaTEScore", "no RaTE-NER-Deberta/config.json"),
    ],
)
def test_a_model_that_is_not_there_is_named_and_its_package_not_called(
    name, module, scorer, reason, monkeypatch, tmp_path
):
    fake(monkeypatch, tmp_path, module, scorer, None)
    Fake.calls = []
    assert reason in worker.compute(job(name))["unavailable"] and Fake.calls == []
    monkeypatch.setattr(worker, "version", lambda package: "2.5.1")
    assert "would unpickle" in worker.compute(job(name))["unavailable"]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda needed: None if needed == module else object())
    assert "is not installed" in worker.compute(job(name))["unavailable"]


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        ('AttributeError("BertTokenizer has no attribute encode_plus")', "has no attribute encode_plus"),
        ("ValueError(predictions)", "failed with ValueError"),
    ],
)
def test_a_failing_package_is_a_reason_without_the_text_of_a_report(raised, shown, monkeypatch, tmp_path):
    lines = ["def F1CheXbert():", " def call(hyps, refs):", "  predictions = hyps", f"  raise {raised}", " return call"]
    (tmp_path / "f1chexbert.py").write_text("\n".join(lines))
    for file in ("chexbert/chexbert.pth", "bert-base-uncased/config.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = model_scores([TextModel("chexbert", tmp_path)], PREDICTIONS, REFERENCES)
    assert list(found) == ["not_available"] and shown in found["not_available"]["chexbert"]
    assert "effusion" not in found["not_available"]["chexbert"]


def test_a_score_that_is_not_a_number_is_missing_with_a_reason(monkeypatch, tmp_path):
    found = {"of_each": {"bertscore_f1": [0.5, float("nan")]}, "of_all": {}, "signature": ""}
    monkeypatch.setattr(scores, "_run", lambda *_: found)
    found = model_scores([TextModel("bertscore", tmp_path)], PREDICTIONS, REFERENCES)
    assert list(found) == ["not_available"] and "not a finite number" in found["not_available"]["bertscore"]


def test_green_is_refused_and_wrong_options_are_errors(tmp_path, capsys):
    found = model_scores([TextModel("green", tmp_path)], PREDICTIONS, REFERENCES)
    assert "trust_remote_code" in found["not_available"]["green"]
    write_predictions(tmp_path / "other.jsonl", [Prediction("a", "report", "?", "clear", "", "clear")])
    for option, message in (
        ("bleurt=x", "there is no such score; choose among bertscore"),
        ("bertscore", "write NAME=FOLDER"),
        (f"bertscore={tmp_path}/absent", "does not exist"),
        (f"radgraph={tmp_path}:3", "only bertscore has a layer"),
    ):
        assert main(["score", str(tmp_path / "other.jsonl"), "--models", option]) == 2
        assert message in capsys.readouterr().err
    options = ["--models", f"bertscore={tmp_path}", "--models-python", str(tmp_path / "absent")]
    assert main(["score", str(tmp_path / "other.jsonl"), *options]) == 2
    assert "cannot be run" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "other.jsonl"), *options[2:]]) == 2
    assert "--models-python has no effect without --models" in capsys.readouterr().err
    twice = ["--models", f"bertscore={tmp_path}", f"bertscore={tmp_path}:2"]
    assert main(["score", str(tmp_path / "other.jsonl"), *twice]) == 2
    assert "names bertscore 2 times" in capsys.readouterr().err
    found = model_scores([TextModel("bertscore", tmp_path)], PREDICTIONS, REFERENCES, python="/bin/true")
    assert "wrote no result" in found["not_available"]["bertscore"]
