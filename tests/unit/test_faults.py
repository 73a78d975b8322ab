"""The fault script: what it injects, and that it notices a run which has not survived."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from medalign.run_folder import RunFolder
from tools.faults.injection import applicable, damage, expected_status
from tools.faults.run_under_test import NotSurvivedError, RunUnderTest
from tools.faults.summary import summarize, table

ROOT = Path(__file__).parents[2]
EXACT = ("loss/total", "loss/language", "loss/similarity", "loss/attention", "optim/grad_norm", "optim/lr")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run with two checkpoints."""
    found = RunFolder(tmp_path / "run")
    for step in (4, 8):
        for name in ("state/shard.pt", "complete.json"):
            path = found.checkpoints.step(step).path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0123456789")
    found.checkpoints.latest.write_text("step-000008\n")
    return found


@pytest.mark.parametrize("seed", range(12))
def test_damage_changes_the_newest_checkpoint_and_leaves_the_one_before(folder, seed):
    def content() -> dict[str, bytes]:
        root = folder.checkpoints.path
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    before = content()
    form = damage(folder, random.Random(seed))
    after = content()
    changed = {name for name in before if after.get(name) != before[name]}
    assert len(changed) == 1 and form
    assert not any(name.startswith("step-000004") for name in changed)


def test_faults_that_make_no_sense_are_not_drawn(folder, tmp_path):
    assert set(applicable(1, False, folder)) == {"KILL of all ranks", "TERM", "USR1", "damaged checkpoint"}
    assert set(applicable(2, False, folder)) - set(applicable(1, False, folder)) == {"STOP", "KILL of a rank"}
    assert "damaged checkpoint" not in applicable(2, True, RunFolder(tmp_path / "none"))


def test_the_exit_status_is_part_of_survival():
    assert expected_status("USR1", [75, 75], False) and not expected_status("USR1", [75, 1], False)
    assert expected_status("TERM", [-15], True) and not expected_status("TERM", [1], True)
    assert expected_status("STOP", [124, -9], False) and not expected_status("STOP", [1, -9], False)


@pytest.mark.parametrize(
    ("values", "message"),
    [([(1, 0.5), (2, 0.25)], ""), ([(1, 0.5), (2, 0.75)], "step 2 differs"), ([(1, 0.5), (1, 0.5)], "differs")],
)
def test_a_row_that_differs_is_not_survived(tmp_path, values, message):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"step": step, **dict.fromkeys(EXACT, v)}) + "\n" for step, v in values))
    reference = [(step, *[value] * 6) for step, value in ((1, 0.5), (2, 0.25), (3, 0.125))]
    run = RunUnderTest(tmp_path / "tiny.yaml", tmp_path / "run", 1, 0, reference)
    if not message:
        run.require_equal()
        return
    with pytest.raises(NotSurvivedError, match=message):
        run.require_equal()


def test_the_summary_counts_by_kind_and_ranks():
    trial = {"ranks": 1, "kind": "TERM", "in": "training", "survived": True}
    early = trial | {"in": "start", "survived": False, "seconds_to_checkpoint": 9.0}
    trials = [trial | {"seconds_to_checkpoint": 0.25}, early, trial | {"ranks": 2}]
    found = summarize(trials, {})
    assert (found["trials"], found["survived"], found["in_start"]) == (3, 2, 1)
    assert [(row["ranks"], row["trials"], row["survived"]) for row in found["faults"]] == [(1, 2, 1), (2, 1, 1)]
    assert table(found).splitlines()[2] == "| TERM | 1 | 2 | 1 | 0.2, 0.2 |  |"


def test_the_documentation_has_the_table_of_the_results():
    facts = json.loads((ROOT / "tools" / "benchmarks" / "results" / "faults.json").read_text())
    assert table(facts) in (ROOT / "docs" / "results" / "resume.md").read_text()
    assert facts["survived"] == facts["trials"] > 0
