"""Measure whether the teacher's attention targets follow the question, on phantom films with known boxes.

python -m tools.benchmarks.text_attention --output tools/benchmarks/results/text_attention.json

Each finding of a film is asked for by a question. On the teacher's grid:

- own_over_others: share of the findings whose boxes get a higher density than the boxes of the film's findings of other
  kinds; only films that have such. 50 % is what a map gives that does not know the question.
- pointing: share of the findings whose boxes hold the largest value, whichever of that kind.
- inside: mean share of the map inside the boxes of that kind.
- change: total variation between the maps of a film's finding and another finding, 0 for equal maps.

The report of each film, and as a control the report of the next film with findings, in the place of a question:

- pointing: share of the films in which the largest value lies in the box of a finding.
- inside: mean share of the map inside the boxes of all findings of the film.

Intervals of 95 % are from a bootstrap over films.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli

import medalign
from medalign.geometry import CanvasFrame, coverage, square_canvas
from medalign.phantom import KINDS, Finding, Study, stream, study
from medalign.teacher.loading import load_teacher
from medalign.teacher.model import Teacher

FOLDER = Path(medalign.__file__).parent / "assets" / "phantom_teacher"
QUESTIONS: dict[str, str] = {kind: f"Is there {kind}?" for kind in KINDS}
TARGETS: dict[str, dict[str, Any]] = {
    "class token": {"text_weight": 0.0},
    "text-conditioned": {"text_weight": 1.0},
    "text-conditioned, minus absent prompts": {"text_weight": 1.0, "text_absent_weight": 1.0},
    "half class token, half text-conditioned": {"text_weight": 0.5},
}
MEASURES = ("own_over_others", "pointing", "inside", "change")
RESAMPLES = 2000


def maps_of_questions(teacher: Teacher, items: Sequence[Study], asked: dict[str, str]) -> dict[str, np.ndarray]:
    """The attention target [films, M], each row of sum 1, for the question about each kind of finding."""
    pixels = torch.stack([teacher.preprocess_cfg.view(square_canvas(item.image)) for item in items])
    result = {}
    for kind, question in asked.items():
        with torch.no_grad():
            chunks = [teacher(chunk, [question] * len(chunk))[1] for chunk in pixels.split(100)]
        maps = torch.cat(chunks)
        result[kind] = (maps / maps.sum(1, keepdim=True)).numpy()
    return result


def measure_film(item: Study, maps: dict[str, np.ndarray], teacher: Teacher) -> list[dict[str, float]]:
    """The measures of each finding of a film; `own_over_others` and `change` only where there are other kinds."""
    frame = CanvasFrame(*item.image.size)

    def covered(findings: Sequence[Finding]) -> np.ndarray:
        return coverage([frame.to_unit(found.box) for found in findings], teacher.grid)

    rows = []
    for found in item.findings:
        own, same = maps[found.kind], covered([other for other in item.findings if other.kind == found.kind])
        row = {"pointing": float(same[own.argmax()] > 0), "inside": float((own * same).sum())}
        if others := [other for other in item.findings if other.kind != found.kind]:
            mine, theirs = covered([found]), covered(others)
            row["own_over_others"] = float((own * mine).sum() / mine.sum() > (own * theirs).sum() / theirs.sum())
            row["change"] = float(np.abs(own - maps[others[0].kind]).sum() / 2)
        rows.append(row)
    return rows


def measure_reports(items: Sequence[Study], reports: Sequence[str], teacher: Teacher) -> list[list[dict[str, float]]]:
    """The measures of each film's target, given a report for each film."""
    pixels = torch.stack([teacher.preprocess_cfg.view(square_canvas(item.image)) for item in items])
    with torch.no_grad():
        maps = torch.cat(
            [
                teacher(pixels[chunk], ["Describe this film."] * len(chunk), [reports[i] for i in chunk])[1]
                for chunk in torch.arange(len(items)).split(100)
            ]
        )
    rows = []
    for item, values in zip(items, (maps / maps.sum(1, keepdim=True)).numpy(), strict=True):
        frame = CanvasFrame(*item.image.size)
        own = coverage([frame.to_unit(found.box) for found in item.findings], teacher.grid)
        rows.append([{"pointing": float(own[values.argmax()] > 0), "inside": float((values * own).sum())}])
    return rows


def summarize(films: Sequence[list[dict[str, float]]], seed: int, measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """Mean of each measure over findings, with its interval and the number of findings."""
    draws = np.random.default_rng(seed).integers(len(films), size=(RESAMPLES, len(films)))
    result = {}
    for name in measures:
        sums = np.array([sum(row[name] for row in rows if name in row) for rows in films])
        counts = np.array([sum(name in row for row in rows) for rows in films])
        low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
        mean = sums.sum() / counts.sum()
        result[name] = {"mean": round(mean, 4), "interval": [round(low, 4), round(high, 4)], "count": int(counts.sum())}
    return result


def measure(count: int, seed: int) -> dict[str, Any]:
    """All targets, and a control in which each question asks for the next kind of finding, on films with findings."""
    items = [item for item in (study(stream(seed, "test"), index) for index in range(count)) if item.findings]
    shifted: dict[str, str] = dict(zip(KINDS, [QUESTIONS[kind] for kind in (*KINDS[1:], KINDS[0])], strict=True))
    cases: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        name: (settings, QUESTIONS) for name, settings in TARGETS.items()
    }
    cases["text-conditioned, asked for another finding"] = ({"text_weight": 1.0}, shifted)
    result = {}
    for name, (settings, asked) in cases.items():
        teacher = load_teacher(FOLDER, **settings)
        maps = maps_of_questions(teacher, items, asked)
        rows = [measure_film(item, {kind: maps[kind][i] for kind in KINDS}, teacher) for i, item in enumerate(items)]
        result[name] = summarize(rows, seed)
    return result


def measure_all_reports(count: int, seed: int) -> dict[str, Any]:
    """The targets of reports, and a control with the report of another film."""
    items = [item for item in (study(stream(seed, "test"), index) for index in range(count)) if item.findings]
    own, others = [item.report for item in items], [item.report for item in (*items[1:], items[0])]
    text, both = {"text_weight": 1.0, "text_reports": True}, {"text_weight": 0.5, "text_reports": True}
    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "class token": ({}, own),
        "text-conditioned": (text, own),
        "text-conditioned, minus absent prompts": ({**text, "text_absent_weight": 1.0}, own),
        "half class token, half text-conditioned": (both, own),
        "text-conditioned, report of another film": (text, others),
    }
    return {
        name: summarize(measure_reports(items, reports, load_teacher(FOLDER, **settings)), seed, MEASURES[1:3])
        for name, (settings, reports) in cases.items()
    }


def main(films: int = 300, seed: int = 0, output: Path | None = None) -> None:
    """Measure, and print or write the result.

    Args:
        films: films of the test stream.
        seed: seed of the stream and of the bootstrap.
        output: JSON file; None prints only.
    """
    command = "python -m tools.benchmarks.text_attention --output tools/benchmarks/results/text_attention.json"
    result = {"command": command, "films": films, "seed": seed, "targets": measure(films, seed)}
    result["reports"] = measure_all_reports(films, seed)
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
