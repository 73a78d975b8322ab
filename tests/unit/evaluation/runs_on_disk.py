"""Folders of runs as training and evaluation write them, with synthetic numbers and real phantom shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from medalign.data.shards.index import ShardIndex
from medalign.evaluation.grounding import grounding
from medalign.evaluation.metrics import Prediction, score, write_predictions
from medalign.evaluation.metrics.scores import group
from medalign.geometry import CanvasFrame, PatchGrid, coverage
from medalign.observability.rows import JsonlSink

GRID = PatchGrid(8, 8)


def make_run(folder: Path, shards: Path, *, skill: float, aim: float, steps: int, config: dict, seed: int = 0) -> Path:
    """A run that answers correctly with probability `skill`, with the share `aim` of its attention in the boxes."""
    draw = np.random.default_rng(seed)
    index = ShardIndex.open(shards)
    rows = [predict(index, i, draw, skill, aim) for i in range(len(index))]
    target = folder / "evaluation" / shards.name
    write_predictions(target / "predictions.jsonl", rows)
    facts = {"name": shards.name, "data": [str(shards)], "grid": [GRID.rows, GRID.columns], "unreadable": 0}
    (target / "scores.json").write_text(json.dumps(score(rows) | facts))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if steps:
        write_metrics(folder / "metrics.jsonl", steps, draw, distils=config["losses"]["alpha"] > 0)
    return folder


def predict(index: ShardIndex, i: int, draw: np.random.Generator, skill: float, aim: float) -> Prediction:
    sample = index.read(i)
    row = Prediction(sample.key, sample.task, sample.question, sample.answer, sample.answer_type, sample.answer)
    if draw.random() > skill:
        wrong = {"closed": "no" if sample.answer.lower().startswith("yes") else "yes", "open": "left lung"}
        row.prediction = wrong.get(group(row), "The heart is normal. " + " ".join(sample.answer.split()[:5]))
    frame = CanvasFrame(*sample.images[0].size)
    attention_N = draw.gamma(0.6, size=GRID.size)
    attention_N /= attention_N.sum()
    if sample.boxes:
        inside_N = coverage([frame.to_unit(box) for box in sample.boxes], GRID)
        attention_N = (1 - aim) * attention_N + aim * inside_N / inside_N.sum()
        found = grounding(attention_N, sample.boxes, frame, GRID)
        row.attention_inside, row.box_area, row.pointing_hit = found.inside, found.area, found.hit
        row.pointing_chance = found.chance
        row.boxes = [list(map(float, box)) for box in sample.boxes]
    row.attention, row.image_size = attention_N.tolist(), (frame.width, frame.height)
    row.image = sample.key.rpartition("-")[0]  # the film of a phantom's questions
    return row


def write_metrics(path: Path, steps: int, draw: np.random.Generator, *, distils: bool) -> None:
    sink = JsonlSink(path)
    for step in range(10, steps + 1, 10):
        language = 0.7 + 2.2 * np.exp(-step / 150) + 0.06 * draw.standard_normal()
        similarity = 0.05 + 0.2 * np.exp(-step / 200) + 0.005 * draw.standard_normal() if distils else 0.0
        attention = 0.4 + 1.1 * np.exp(-step / 300) + 0.03 * draw.standard_normal() if distils else 0.0
        terms = {"loss/similarity": similarity, "loss/attention": attention} if distils else {}
        sink.log(
            step,
            {
                "loss/total": language + similarity + 0.3 * attention,
                "loss/language": language,
                **terms,
                "optim/grad_norm": 0.6 + 2 * np.exp(-step / 80) + abs(0.2 * draw.standard_normal()),
                "optim/lr": 2e-4 * (1 - step / steps),
                "speed/samples_per_second": 41.0 - 9 * distils + draw.standard_normal(),
                "speed/tokens_per_second": 5100.0 - 1000 * distils,
                "speed/data_wait_share": 0.012,
                "memory/cpu_peak_gib": 1.41 + 0.2 * distils,
                "data/skipped": 0,
                "data/truncated": step // 100,
            },
        )
    sink.close()
