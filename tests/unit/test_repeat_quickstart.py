"""The quickstart over several seeds: intervals, paired differences, finished arms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.benchmarks import repeat_quickstart as tool

DATA_WAIT = '{"step": 10, "speed/data_wait_share": 0.25}\n'
CONFIG = "run:\n  dir: {arm}\n  seed: 0\nlosses:\n  alpha: {alpha}\n  impl: auto\nstudent:\n  lora:\n    alpha: 32\n"


@pytest.fixture
def by_seed() -> dict[int, dict[str, dict[str, float]]]:
    """Three seeds: MedAlign is 0.04, 0.05, 0.06 above language in closed accuracy, independent of the seed's level."""
    base = {0: 0.5, 1: 0.7, 2: 0.6}
    lead = {0: 0.04, 1: 0.05, 2: 0.06}
    found = {}
    for seed, level in base.items():
        arms = {arm: {"closed_accuracy": level, "open_exact": level, "bleu": 10.0 * level} for arm in tool.ARMS}
        arms["medalign"] = {
            "closed_accuracy": level + lead[seed],
            "open_exact": level + 0.1,
            "bleu": 10.0 * level + seed,
        }
        found[seed] = arms | {"blind": {"closed_accuracy": 0.5}}
    del found[1]["steered"]["bleu"]  # a seed without reports
    return found


def test_every_score_has_its_seeds_and_its_interval(by_seed):
    arms = tool.table(by_seed)
    assert list(arms) == ["blind", "base", "language", "steered", "untrained", "medalign"]
    found = arms["base"]["closed_accuracy"]
    half = 4.302653 * 0.1 / math.sqrt(3)  # the quantile of two degrees of freedom, the deviation of 0.5, 0.7, 0.6
    assert found["seeds"] == [0.5, 0.7, 0.6] and (found["mean"], found["spread"]) == (0.6, 0.1)
    assert (found["low"], found["high"]) == (round(0.6 - half, 4), round(0.6 + half, 4))
    assert arms["base"]["bleu"]["mean"] == 6.0 and arms["base"]["bleu"]["low"] == round(6 - 10 * half, 4)
    assert arms["steered"]["bleu"]["seeds"] == [5.0, 6.0] and "bleu" not in arms["blind"]


def test_differences_are_those_of_each_seed(by_seed):
    """The interval is that of the paired differences, which is far narrower than those of the arms."""
    found = tool.differences(by_seed)
    assert list(found) == ["medalign - language", "medalign - steered", "medalign - untrained"]
    closed = found["medalign - language"]["closed_accuracy"]
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert closed == {
        "mean": 0.05,
        "spread": 0.01,
        "low": round(0.05 - half, 4),
        "high": round(0.05 + half, 4),
        "seeds": [0.04, 0.05, 0.06],
    }
    constant = found["medalign - untrained"]["open_exact"]
    assert constant["low"] == constant["high"] == constant["mean"] == 0.1
    assert found["medalign - language"]["bleu"]["seeds"] == [0.0, 1.0, 2.0]
    assert found["medalign - steered"]["bleu"]["seeds"] == [0.0, 2.0]  # of the seeds that have both


def test_one_seed_has_no_interval(by_seed):
    assert tool.summary([0.5]) == {"mean": 0.5, "seeds": [0.5]}
    only = {0: by_seed[0]}
    assert "low" not in tool.differences(only)["medalign - language"]["bleu"]
    assert "[" not in tool.as_text(tool.table(only), tool.SCORES)


def test_the_text_shows_bleu_and_differences_with_intervals(by_seed):
    lines = tool.as_text(tool.differences(by_seed), tool.COMPARED).splitlines()
    assert lines[0].split() == ["closed_accuracy", "open_exact", "bleu"]
    assert lines[1].startswith("medalign - language") and "0.050 [0.025, 0.075]" in lines[1]
    assert "1.000 [-1.484, 3.484]" in lines[1]
    assert "bleu" in tool.as_text(tool.table(by_seed), tool.SCORES).splitlines()[0]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Every arm with scores, as the quickstart writes them, but without questions for the arm "blind"."""
    for arm in tool.ARMS:
        tool.scores_file(tmp_path, arm).parent.mkdir(parents=True)
        tool.scores_file(tmp_path, arm).write_text(json.dumps({"n": 20, "bleu": 5.0}))
        (tmp_path / arm / "metrics.jsonl").write_text(DATA_WAIT if arm != "base" else "")
        (tmp_path / arm / "config.yaml").write_text(CONFIG.format(arm=arm, alpha=float(arm == "medalign")))
    return tmp_path


def test_finished_arms_are_not_run_again(finished, monkeypatch, capsys):
    started = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> None:
        started.append((command[:2], env["SEED"], env["ARMS"]))
        tool.scores_file(finished, "steered").write_text(json.dumps({"n": 20, "bleu": 6.0}))

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(tool, "blind", lambda _data: {})
    assert set(tool.run(3, finished)) == {*tool.ARMS, "blind"} and started == []
    tool.scores_file(finished, "steered").unlink()
    scores = tool.run(3, finished)
    assert started == [(["bash", "tools/quickstart.sh"], "3", "steered")]
    assert scores["steered"] == {"n": 20, "bleu": 6.0, "data_wait_share": 0.25}
    assert "data_wait_share" not in scores["base"]
    assert capsys.readouterr().err == ""


def test_arms_that_cannot_be_compared_are_reported(finished, monkeypatch, capsys):
    monkeypatch.setattr(tool, "blind", lambda _data: {})
    config = finished / "steered/config.yaml"
    config.write_text(config.read_text().replace("    alpha: 32", "    alpha: 64"))
    tool.run(0, finished)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"{finished}: student.alpha: 64 only in steered; train the arms" in lines[1]
    tool.scores_file(finished, "untrained").write_text(json.dumps({"n": 19, "bleu": 5.0}))
    with pytest.raises(SystemExit, match="answered different questions.*'untrained': 19"):
        tool.run(0, finished)


def test_the_json_contains_arms_and_differences(by_seed, tmp_path, monkeypatch, capsys):
    by_seed[1]["base"]["n"] = by_seed[0]["base"]["n"] = 20
    monkeypatch.setattr(tool, "run", lambda seed, _folder, _arms: by_seed[seed])
    output = tmp_path / "quickstart.json"
    monkeypatch.setattr(sys, "argv", ["repeat_quickstart", "--seeds", "0", "1", "--output", str(output)])
    tool.main()
    written = json.loads(output.read_text())
    assert written["questions"] == [20, 20]
    assert written["differences"]["medalign - language"]["bleu"]["seeds"] == [0.0, 1.0]
    assert written["arms"]["medalign"]["bleu"]["seeds"] == [5.0, 8.0]
    assert "medalign - steered" in capsys.readouterr().out


def test_one_arm_is_run_and_the_others_are_read_from_the_file(by_seed, tmp_path, monkeypatch):
    for scores in by_seed.values():
        for arm in tool.ARMS:
            scores[arm]["n"] = 20
    monkeypatch.setattr(tool, "run", lambda seed, _folder, arms: {a: by_seed[seed][a] for a in (*arms, "blind")})
    output = tmp_path / "quickstart.json"
    words = ["repeat_quickstart", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--arms", "steered"])
    with pytest.raises(SystemExit, match="does not contain base, language, untrained, medalign for seeds"):
        tool.main()
    monkeypatch.setattr(sys, "argv", words)
    tool.main()
    whole = json.loads(output.read_text())
    by_seed[0]["steered"]["bleu"] = 8.0
    monkeypatch.setattr(sys, "argv", [*words, "--arms", "steered"])
    tool.main()
    renewed = json.loads(output.read_text())
    assert renewed["arms"]["steered"]["bleu"]["seeds"] == [8.0, 6.0]
    for arm in ("blind", "base", "language", "untrained", "medalign"):
        assert renewed["arms"][arm] == whole["arms"][arm]
    assert renewed["questions"] == whole["questions"]
    assert renewed["differences"]["medalign - steered"] != whole["differences"]["medalign - steered"]
