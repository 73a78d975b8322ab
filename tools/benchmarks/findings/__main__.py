"""Measures the labeler of findings.

`python -m tools.benchmarks.findings [--notes ANNOTATIONS] [--output FILE]`

- sentences: sentences.jsonl, written for this purpose and labeled by hand, with the difficulties that NegEx, ConText,
  NegBio and CheXpert describe.
- phantoms: reports of the phantom studies, whose findings are known by construction.
- notes: with --notes, the distinct notes of the data set covid_chestxray (annotations.jsonl), of which notes.jsonl has
  labels by hand, by id. The notes themselves are not part of this project.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medalign.evaluation.findings import Labeler, chest_labeler
from medalign.phantom.contracts import Finding
from medalign.phantom.findings import draw_sites
from medalign.phantom.language import write_report

HERE = Path(__file__).parent
ASSERTIONS = ("present", "uncertain", "absent")
LUNGS = ("consolidation", "lung opacity", "pneumonia", "edema", "atelectasis", "nodule", "lung lesion")
STUDIES = 2000
Truth = dict[str, tuple[str, frozenset[str], frozenset[str]]]  # finding -> assertion, sides, zones
Case = tuple[str, Truth]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=Path, help="annotations.jsonl of covid_chestxray")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    labeler = chest_labeler()
    sets = {"sentences": list(read_sentences(labeler)), "phantoms": list(phantom_reports(STUDIES))}
    if arguments.notes:
        sets["notes"] = list(read_notes(labeler, arguments.notes))
    figures = {"signature": labeler.signature, **{name: measure(labeler, cases) for name, cases in sets.items()}}
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text, end="")  # noqa: T201


def read_sentences(labeler: Labeler) -> Iterator[Case]:
    """Yield the labeled sentences."""
    for row in _rows(HERE / "sentences.jsonl"):
        yield row["text"], truth_of(row, labeler)


def read_notes(labeler: Labeler, path: Path) -> Iterator[Case]:
    """Yield the labeled notes."""
    notes = {row["id"]: row["report"] for row in _rows(path)}
    for row in _rows(HERE / "notes.jsonl"):
        yield notes[row["id"]], truth_of(row, labeler)


def phantom_reports(count: int) -> Iterator[Case]:
    """Yield reports of phantoms. Only present findings are known: a report denies some of the others."""
    for seed in range(count):
        draw = np.random.default_rng([seed, 0])
        empty = np.zeros((1, 1), dtype=bool)
        sites = draw_sites(draw)
        found = [Finding(kind, side, zone, "small", (0, 0, 1, 1), empty) for kind, side, zone in sites]
        text = write_report(draw, found)
        truth: Truth = {}
        for kind, side, _ in sites:
            name = "pleural effusion" if kind == "effusion" else kind
            before = truth[name][1] if name in truth else frozenset()
            truth[name] = ("present", before | ({side} if side else set()), frozenset())
        yield text, truth


def truth_of(row: dict[str, Any], labeler: Labeler) -> Truth:
    """Return the labels of a row: "FINDING" or "FINDING@SIDES/ZONES"; LUNGS and ALL stand for several findings."""
    several = {"LUNGS": LUNGS, "ALL": tuple(name for name in labeler.lexicon.findings if name != "support devices")}
    found: Truth = {}
    for assertion in ASSERTIONS:
        for word in row.get(assertion, []):
            name, _, where = word.partition("@")
            sides, _, zones = where.partition("/")
            for finding in several.get(name, (name,)):
                assert finding in labeler.lexicon.findings, f"{word} in {row}"
                found[finding] = (assertion, frozenset(filter(None, sides.split(","))), _split(zones))
    return found


def _split(words: str) -> frozenset[str]:
    return frozenset(filter(None, words.split(",")))


def measure(labeler: Labeler, cases: Iterable[Case]) -> dict[str, Any]:
    """Return precision and recall by assertion, the share of right places, and the time per text."""
    counts: Counter[tuple[str, str]] = Counter()
    cases = list(cases)
    complete = any(label[0] == "absent" for _, truth in cases for label in truth.values())
    start = time.perf_counter()
    found = [labeler.label(text) for text, _ in cases]
    seconds = time.perf_counter() - start
    for labels, (_, truth) in zip(found, cases, strict=True):
        for name, label in labels.items():
            counts[label.assertion, "given"] += 1
            true = truth.get(name)
            if true is not None and true[0] == label.assertion:
                counts[label.assertion, "right"] += 1
                if label.assertion == "present":
                    counts["sides", "given"] += 1
                    counts["sides", "right"] += label.sides == true[1]
                    counts["zones", "given"] += 1
                    counts["zones", "right"] += label.zones == true[2]
        counts.update((label[0], "true") for label in truth.values())
    kinds = ASSERTIONS if complete else ("present",)
    figures: dict[str, Any] = {"texts": len(cases)}
    for kind in kinds:
        right, given, known = (counts[kind, name] for name in ("right", "given", "true"))
        figures[kind] = {"right": right, "labeled": given, "true": known}
        figures[kind] |= {"precision": round(right / max(given, 1), 3), "recall": round(right / max(known, 1), 3)}
    for kind in ("sides", "zones") if complete else ("sides",):
        figures[f"{kind}_right"] = round(counts[kind, "right"] / max(counts[kind, "given"], 1), 3)
    return figures | {"milliseconds_per_text": round(1000 * seconds / len(cases), 1)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
