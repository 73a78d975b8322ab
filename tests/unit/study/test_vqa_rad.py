"""The study on VQA-RAD with stand-ins for training and answering: its commands, its result and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medalign import config as medalign_config
from medalign.evaluation.metrics import Prediction, score, write_predictions
from tools.study import vqa_rad

QUESTIONS = [("Is there a fracture?", "yes"), ("Is it normal?", "no"), ("Which lobe?", "left upper")]
RIGHT = {"base": 0, "L": 1, "B": 3}  # questions that each arm answers correctly


def answered(right: int) -> list[Prediction]:
    wrong = {"yes": "no", "no": "yes", "left upper": "liver"}
    return [
        Prediction(
            f"q{place}",
            "vqa",
            question,
            answer,
            "open" if " " in answer else "closed",
            answer if place < right else wrong[answer],
            "stop",
            image=f"image {place}",
        )
        for place, (question, answer) in enumerate(QUESTIONS)
    ]


def test_both_arms_of_each_seed_and_the_untrained_student_are_scored(tmp_path: Path, capsys: Any) -> None:
    trained: list[str] = []

    def execute(words: Sequence[str], folder: Path) -> None:
        if words[0] == "train":
            settings = medalign_config.load(words[1], list(words[2:]), models=False, data=False)
            run = f"{Path(settings.run.dir).name} {settings.run.seed} {settings.train.steps} {settings.losses.alpha:g}"
            trained.append(run)
            return
        run = Path(words[1])
        rows, target = answered(RIGHT[run.name.partition("-")[0]]), run / "evaluation" / "test"
        write_predictions(target / "predictions.jsonl", rows)
        probes = {name: {"accuracy": 0.25} for name in words[words.index("--probes") + 1 :]}
        facts = {"probes": probes, "provenance": {"versions": {"medalign": "0"}}}
        (target / "scores.json").write_text(json.dumps(score(rows) | facts))

    (tmp_path / "runs").mkdir()
    vqa_rad.run(tmp_path / "shards", tmp_path / "runs", tmp_path / "found.json", (0, 1), 3, execute)
    assert sorted(trained) == ["B-0 0 None 1", "B-1 1 None 1", "L-0 0 None 0", "L-1 1 None 0", "base 0 0 1"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [found["runs"][run]["closed_accuracy"] for run in ("base", "L-1", "B-1")] == [0.0, 0.5, 1.0]
    assert found["runs"]["B-0"]["no-image"] == 0.25
    correct = next(one for one in found["B - L"] if one["metric"] == "questions_correct")
    assert (correct["baseline_score"], correct["arm_score"], correct["unit"]) == (1 / 3, 1.0, "seed")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| arm | closed_accuracy | closed_majority | open_exact |")
    assert shown[4].startswith("| B | 100.0 |")
    assert any(line.startswith("| questions_correct | +66.7 |") for line in shown)
