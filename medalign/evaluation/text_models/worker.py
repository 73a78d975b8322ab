"""Computes one score by its authors' package. A program of its own that imports nothing of this project.

It reads a job from stdin, as JSON: `name`, `model` (the name of the model's folder, which is the working directory),
`layers` (or null), `predictions` and `references`. It writes one JSON object to stdout:

  of_each      score -> one value per report
  of_all       score -> one value for all reports
  signature    settings and version

or `unavailable`, the reason why it has no score. If the package fails, it ends with the traceback.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Result = dict[str, Any]


def bertscore(job: Job) -> Result:
    """Compare the vectors of tokens at a layer, without weights by frequency and without a baseline."""
    from bert_score import BERTScorer
    from bert_score.utils import model2layers

    name = job["model"]
    known = {model.rpartition("/")[2]: layer for model, layer in model2layers.items()}
    layers = known.get(name) if job["layers"] is None else job["layers"]
    if layers is None:
        return {"unavailable": f"bert-score has no layer for a model called {name}; name one: bertscore=FOLDER:LAYER"}
    # Not the whole path: the package takes every path with "t5" in it for a T5.
    scorer = BERTScorer(model_type=".", num_layers=layers, use_fast_tokenizer=True)
    pairs = list(zip(job["predictions"], job["references"], strict=True))
    # The package gives 0 to a text without tokens, but its call for that is not in transformers 5.
    usable = [i for i, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    scores = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    of_each = {score: [0.0] * len(pairs) for score in scores}
    if usable:
        found = scorer.score([pairs[i][0] for i in usable], [pairs[i][1] for i in usable])
        for score, values in zip(scores, found, strict=True):
            for i, value in zip(usable, values.tolist(), strict=True):
                of_each[score][i] = value
    return {"of_each": of_each, "of_all": {}, "signature": f"model:{name}|layer:{layers}|idf:no|rescaled:no"}


def chexbert(job: Job) -> Result:
    """Compare the findings that CheXbert labels as present or uncertain; 14 of them, or the 5 that are most common."""
    if reason := _lacks("chexbert/chexbert.pth", "bert-base-uncased/config.json"):
        return {"unavailable": reason}
    from f1chexbert import F1CheXbert

    accuracy, _, of_14, of_5 = F1CheXbert()(hyps=job["predictions"], refs=job["references"])
    scores = {"chexbert_accuracy_5": float(accuracy)}
    for labels, report in ((14, of_14), (5, of_5)):
        for kind in ("micro", "macro"):
            scores[f"chexbert_{kind}_f1_{labels}"] = float(report[f"{kind} avg"]["f1-score"])
    return {"of_each": {}, "of_all": scores, "signature": "labels:present-or-uncertain"}


def radgraph(job: Job) -> Result:
    """Compare graphs of entities and relations: entities, entities that have any relation, and whole relations."""
    kinds = [name for name in ("radgraph-xl", "modern-radgraph-xl", "radgraph") if Path(name, "config.json").is_file()]
    if not kinds:
        return {"unavailable": "the folder has no radgraph-xl/config.json; unpack radgraph-xl.tar.gz there"}
    from radgraph import F1RadGraph

    scorer = F1RadGraph(reward_level="all", model_type=kinds[0], model_cache_dir=str(Path.cwd()))
    _, rewards, _, _ = scorer(refs=job["references"], hyps=job["predictions"])
    names = ("radgraph_simple", "radgraph_partial", "radgraph_complete")
    of_each = {name: [float(value) for value in values] for name, values in zip(names, rewards, strict=True)}
    return {"of_each": of_each, "of_all": {}, "signature": f"model:{kinds[0]}"}


def ratescore(job: Job) -> Result:
    """Compare medical entities by their meaning, with the package's weights for long reports."""
    if reason := _lacks("RaTE-NER-Deberta/config.json", "BioLORD-2023-C/config.json"):
        return {"unavailable": reason}
    import torch
    from RaTEScore import RaTEScore

    scorer = RaTEScore("RaTE-NER-Deberta", "BioLORD-2023-C", use_gpu=torch.cuda.is_available())
    # One pair per call: in a list, the package loses the place of a report without sentences.
    pairs = zip(job["predictions"], job["references"], strict=True)
    found = [scorer.compute_score([prediction], [reference]) for prediction, reference in pairs]
    return {
        "of_each": {"ratescore": [float(one[0]) if one else 0.0 for one in found]},
        "of_all": {},
        "signature": "affinity:long",
    }


SCORES: dict[str, tuple[str, str, Callable[[Job], Result]]] = {  # name -> module, package, function
    "bertscore": ("bert_score", "bert-score", bertscore),
    "chexbert": ("f1chexbert", "f1chexbert", chexbert),
    "radgraph": ("radgraph", "radgraph", radgraph),
    "ratescore": ("RaTEScore", "RaTEScore", ratescore),
}


def compute(job: Job) -> Result:
    """Return the result of a job."""
    module, package, function = SCORES[job["name"]]
    for needed in (module, "torch"):
        if importlib.util.find_spec(needed) is None:
            return {"unavailable": f"the package {package if needed == module else needed} is not installed"}
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 6):
        return {"unavailable": f"torch {version('torch')} would unpickle the weights; 2.6 and later do not"}
    found = function(job)
    if "signature" in found:
        found["signature"] += f"|version:{version(package)}|transformers:{version('transformers')}"
    return found


def _lacks(*files: str) -> str:
    """Return which of the files the model's folder lacks, as a reason, or ""."""
    missing = [file for file in files if not Path(file).is_file()]
    return f"the folder has no {' and no '.join(missing)}" if missing else ""


def main() -> None:
    """Read the job, and write the result. What a package prints goes to stderr."""
    output, sys.stdout = sys.stdout, sys.stderr
    job = json.load(sys.stdin)
    output.write(json.dumps(compute(job)))


if __name__ == "__main__":
    main()
