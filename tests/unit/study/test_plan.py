"""The plan of the study is that of its protocol."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from medalign import config as medalign_config
from tools.study import runner
from tools.study.analysis import contrasts
from tools.study.arms import ARMS, BASE, Run, chosen, plan, trials

ROOT = Path(__file__).parents[3]


def test_the_plan_is_that_of_the_protocol() -> None:
    runs = list(plan())
    assert len(runs) == 81 and len({run.name for run in runs}) == 81
    seeds = Counter(run.arm for run in runs if not run.trial and run.films == 2000)
    assert seeds == {"L": 8, "B": 8, "U": 8, "T": 8, "V": 5, "A": 5, "X": 5, "S": 5, BASE: 1}
    assert {run.name for run in runs if run.trial} == {
        f"trial-{arm}-{rate}" for arm in ARMS for rate in (0.003, 0.0015)
    }
    assert [run.name for run in runs if not run.trial][:5] == ["base-10", "L-10", "B-10", "L-11", "B-11"]
    assert [run.name for run in runs][-2:] == ["L-1000-12", "B-1000-12"]
    for arm in ARMS:
        order = [run.trial for run in runs if run.arm == arm]
        assert order[:2] == [True, True] and not any(order[2:])
    tuned, studied = ({run.seed for run in runs if run.trial is trial} for trial in (True, False))
    assert tuned == {9} and studied == set(range(10, 18))  # and not 0, 1, 2, which suggested the hypotheses


def test_the_protocol_names_every_arm_and_number() -> None:
    text = (ROOT / "tools/study/protocol.md").read_text()
    for arm, facts in ARMS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
        assert line.endswith(f"| {facts.seeds} |")
    assert all(f"| {name} |" in text for name in contrasts({}))


def test_trials_choose_the_learning_rate() -> None:
    run = Run("B", 12)
    assert chosen(run, {}) is None and chosen(run, {"trial-B-0.003": 0.5, "trial-L-0.0015": 0.9}) is None
    assert chosen(run, {"trial-B-0.003": 0.5, "trial-B-0.0015": 0.6}) == Run("B", 12, rate=1.5e-3)
    assert chosen(run, {"trial-B-0.003": 0.5, "trial-B-0.0015": 0.5}).rate == 3e-3  # the recipe's
    for free in (Run(BASE, 10), trials("B")[1]):
        assert chosen(free, {}) == free


def test_arms_differ_in_what_the_protocol_lists_only(tmp_path: Path) -> None:
    study = runner.Study(tmp_path)
    base, found = None, {}
    for arm in ("B", *ARMS):
        words = study.commands(Run(arm, 10))[0]
        assert words[:2] == ["train", "phantom"]
        settings = medalign_config.load("phantom", words[2:], models=False, data=False)
        flat = dict(_flat(vars(settings)))
        base = base or flat
        found[arm] = {name: value for name, value in flat.items() if base[name] != value and name != "run.dir"}
    off = {"losses.alpha": 0.0, "losses.beta": 0.0}
    assert found == {
        "B": {},
        "L": off,
        "V": {"losses.beta": 0.0},
        "A": {"losses.alpha": 0.0},
        "U": {"teacher.random_weights_seed": 10},
        "T": {"teacher.text_weight": 1.0, "teacher.text_absent_weight": 1.0, "losses.beta": 0.3},
        "X": off | {"losses.extra": ["tools.study.terms.box_attention"]},
        "S": off | {"losses.extra": ["tools.study.terms.shuffled_similarity", "tools.study.terms.shuffled_attention"]},
    }
    assert (base["train.lr"], base["train.steps"], base["train.batch_size"]) == (3e-3, 600, 32)
    assert Run("U", 13).settings[0] == "--teacher.random_weights_seed=13"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        inner = hasattr(value, "__dataclass_fields__")
        found += _flat(vars(value), f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found
