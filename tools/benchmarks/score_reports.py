"""Time to score 10,000 reports with every metric that runs here, metric by metric.

    python -m tools.benchmarks.score_reports --output tools/benchmarks/results/score_reports.json

The reports are those of phantoms: references of drawn findings, and predictions that describe the same findings in
other words, or in every third case those of another study. Processor seconds, Java's included, depend less on other
work on the machine than seconds. Scores by models are not measured: their models are not at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.coco import coco_scores
from medalign.evaluation.metrics.findings import findings_scores
from medalign.evaluation.metrics.intervals import RESAMPLES, mean
from medalign.evaluation.metrics.reports import bleu_with_interval, rouge_l
from medalign.evaluation.metrics.variants import variants
from medalign.phantom.contracts import Finding
from medalign.phantom.findings import draw_sites
from medalign.phantom.language import write_report


def make_reports(count: int, seed: int) -> list[Prediction]:
    """Return reports with their references."""
    rng = np.random.default_rng(seed)
    nothing = np.zeros((1, 1), dtype=bool)
    rows: list[Prediction] = []
    before: list[Finding] = []
    for number in range(count):
        found = [
            Finding(*site, "large" if rng.integers(2) else "small", (0, 0, 1, 1), nothing) for site in draw_sites(rng)
        ]
        given = before if number % 3 == 0 else found
        rows.append(Prediction(str(number), "report", "", write_report(rng, found), "", write_report(rng, given)))
        before = found
    return rows


def timed(compute: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return the seconds and processor seconds of a call, and its result."""
    wall, own = time.perf_counter(), os.times()
    found = compute()
    spent = os.times()
    processor = sum(spent[:4]) - sum(own[:4])  # of this process and of its children
    return {"seconds": round(time.perf_counter() - wall, 2), "processor_seconds": round(processor, 2)}, found


def main() -> None:
    """Time each metric, and all that `medalign score` computes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=10_000)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    rows = make_reports(options.reports, seed=0)
    texts = [row.prediction for row in rows], [row.answer for row in rows]
    metrics: dict[str, Callable[[], Any]] = {
        "BLEU with its interval": lambda: bleu_with_interval(*texts, RESAMPLES),
        "ROUGE-L with its interval": lambda: mean("rouge_l", [rouge_l(r.prediction, r.answer) for r in rows]),
        "variants of BLEU and ROUGE": lambda: variants(*texts),
        "findings": lambda: findings_scores(rows),
        "COCO's BLEU, ROUGE-L, CIDEr and METEOR": lambda: coco_scores(*texts),
        "medalign score, without COCO's": lambda: score(rows),
    }
    score(rows[:10])  # imports
    times, found = {}, None
    for name, compute in metrics.items():
        times[name], found = timed(compute)
        if "not_available" in (found if isinstance(found, dict) else {}):
            times[name] |= {"not_available": found["not_available"]}
        print(f"{name}: {times[name]}", flush=True)
    result = {
        "command": f"python -m tools.benchmarks.score_reports --reports {options.reports}",
        "machine": f"{platform.machine()}, one thread; other work ran on it",
        "reports": options.reports,
        "words_per_report": round(float(np.mean([len(text.split()) for text in texts[1]])), 1),
        "times": times,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
