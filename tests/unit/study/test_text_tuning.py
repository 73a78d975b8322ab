"""The choice among text-conditioned targets: its commands and its rule."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from medalign import config as medalign_config
from tools.study import text_tuning
from tools.study.arms import ARMS
from tools.study.results_file import PRIMARY


def test_a_candidate_is_the_trial_of_b_with_other_targets(tmp_path: Path) -> None:
    train, evaluate = text_tuning.commands(tmp_path / "runs" / "text-x", text_tuning.CANDIDATES["half, beta 0.3"])
    settings = medalign_config.load(train[1], train[2:], models=False, data=False)
    assert (settings.teacher.text_weight, settings.losses.beta, settings.teacher.text_temperature) == (0.5, 0.3, 0.05)
    assert (settings.run.seed, settings.train.lr, settings.run.dir) == (9, 3e-3, "runs/text-x")
    assert evaluate[:4] == ["evaluate", "runs/text-x", "--data", "data/development/val"]


def test_the_choice_follows_the_question_and_costs_no_answers() -> None:
    rows = {
        "costly": {"questions_correct": 0.70, "asked_denser": 0.9},
        "good": {"questions_correct": 0.795, "asked_denser": 0.7},
        "blind": {"questions_correct": 0.85, "asked_denser": 0.5},
    }
    assert text_tuning.choose(rows, 0.80) == "good"
    assert text_tuning.choose(rows, 0.90) == "costly"


def test_arm_t_has_the_settings_that_the_rule_chooses() -> None:
    found = json.loads(text_tuning.RESULT.read_text(encoding="utf-8"))
    rows = found["candidates"]
    assert list(rows) == list(text_tuning.CANDIDATES)
    assert found["chosen"] == text_tuning.choose(rows, found["reference"][PRIMARY])
    assert {*shlex.split(rows[found["chosen"]]["settings"])} == {*ARMS["T"].settings}
