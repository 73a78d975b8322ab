"""The batch scripts on a real cluster: to the end, through a time limit, scancel, a lost rank or node, in arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import losses
from tests.e2e.test_elastic import CUT, GROUPS, LOSSES, RATES, STEPS, column
from tests.slurm.conftest import WORDS

ENDED = "COMPLETED"
NODES = ("--nodes=2", "--ntasks-per-node=1")
SAID = "stopped after step 4 with a checkpoint; the run has 8 steps"


def test_a_chain_of_jobs_runs_to_its_end(cluster, recipe, shards, whole, tmp_path):
    """Index shards, train on two nodes, evaluate: each job begins when the one before it has succeeded."""
    folder = tmp_path / "run"
    first = cluster.submit("shards", "index", str(shards / "train"))
    then = (f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    second = cluster.submit("train", str(recipe), "--run.dir", str(folder), *WORDS, options=(*NODES, *then))
    then = (f"--dependency=afterok:{second}", "--kill-on-invalid-dep=yes")
    third = cluster.submit("evaluate", str(folder), "--data", str(shards / "val"), options=then)
    assert cluster.wait(third) == "COMPLETED", cluster.text()
    assert losses(folder) == losses(whole)
    assert (folder / "evaluation" / "val" / "scores.json").is_file()
    assert "0: step 8/8" in cluster.text()  # with the number of the task
    assert "INFO" in (folder / "logs" / "rank-0.log").read_text() and (folder / "logs" / "rank-1.log").is_file()


def test_a_time_limit_queues_the_job_again_without_losing_a_step(cluster, recipe, whole, tmp_path):
    """The limit is 3 minutes, and USR1 arrives halfway, in step 4."""
    folder, options = tmp_path / "run", (*NODES, "--time=3", "--signal=USR1@90")
    words = (str(recipe), "--run.dir", str(folder), *WORDS)
    job = cluster.submit("train", *words, options=options, MOMENT_CALL="4", MOMENT_ACT="wait")
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    text = cluster.text()
    assert f"SIGUSR1: {SAID}" in text and "resuming from" in text and "step-000004" in text  # the log is appended to
    assert losses(folder) == losses(whole)


def test_a_canceled_job_and_a_killed_rank_resume_exactly(cluster, recipe, whole, tmp_path):
    """After scancel in step 4, a run writes a checkpoint and is not queued again.

    KILL ends rank 1 of the next job in step 6: the run is started again inside the job.
    """
    folder = tmp_path / "run"
    words = (str(recipe), "--run.dir", str(folder), *WORDS)
    job = cluster.submit("train", *words, options=NODES, MOMENT_CALL="4", MOMENT_ACT="wait")
    cluster.wait_for_row(job, folder, 3)
    cluster.scancel(job)
    assert cluster.wait(job) == "CANCELLED"
    assert (folder / "checkpoints" / "latest").read_text() == "step-000004\n" and f"SIGTERM: {SAID}" in cluster.text()
    once = str(tmp_path / "once")
    job = cluster.submit("train", *words, options=NODES, MOMENT_CALL="2", MOMENT_ACT="KILL", MOMENT_ONCE=once)
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    assert losses(folder) == losses(whole)
    rows = [row for row in attempts(folder, "job", "step", "then", "reason") if row[0] == job]
    assert [row[1:3] for row in rows] == [(5, "restarted"), (8, "ended")]
    assert "killed" in rows[0][3]  # of rank 1; or of both, if srun kills rank 0 before it has noticed


def attempts(folder: Path, *names: str) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in names) for row in rows]


def test_the_deepspeed_launcher_per_node_survives_a_stopped_rank(cluster, recipe, whole, tmp_path):
    """SIGSTOP of rank 1 in step 5: the watchdog ends the run, which is started again inside the job."""
    folder, moment = tmp_path / "run", {"MOMENT_CALL": "5", "MOMENT_ACT": "STOP", "MOMENT_ONCE": str(tmp_path / "once")}
    words = (str(recipe), "--run.dir", str(folder), *WORDS, "--engine.step_timeout", "8")
    job = cluster.submit("train_deepspeed", *words, options=("--nodes=2",), SLOTS="1", **moment)
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    assert losses(folder) == losses(whole)
    assert attempts(folder, "status", "step", "then") == [(124, 4, "restarted"), (0, 8, "ended")]
    assert "the run hangs: rank 1 does not answer" in attempts(folder, "reason")[0][0]


@pytest.mark.long
def test_usr1_stops_the_ranks_below_the_deepspeed_launcher(cluster, recipe, whole, tmp_path):
    """As before a time limit: the launchers outlive the signal, and the job is queued again."""
    folder = tmp_path / "run"
    words = (str(recipe), "--run.dir", str(folder), *WORDS)
    moment = {"MOMENT_CALL": "4", "MOMENT_ACT": "wait"}
    job = cluster.submit("train_deepspeed", *words, options=("--nodes=2",), SLOTS="1", **moment)
    cluster.wait_for_row(job, folder, 3)
    cluster.scancel(job, "--signal=USR1")
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    assert f"SIGUSR1: {SAID}" in cluster.text()
    assert losses(folder) == losses(whole)
    assert attempts(folder, "status", "then") == [(75, "requeued"), (0, "ended")]


def test_a_node_that_is_lost_queues_the_job_again(cluster, recipe, whole, tmp_path):
    """KILL of the daemon of the second node in step 4; then the node comes back."""
    folder = tmp_path / "run"
    words = (str(recipe), "--run.dir", str(folder), *WORDS, "--checkpoint.interval", "2")
    job = cluster.submit("train", *words, options=NODES, MOMENT_CALL="4", MOMENT_ACT="wait")
    cluster.wait_for_row(job, folder, 3)
    with cluster.lost_node():
        cluster.wait_for_restart(job)
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    assert losses(folder) == losses(whole) and "resuming from" in cluster.text()


@pytest.mark.long
def test_the_number_of_ranks_may_change_from_job_to_job(cluster, recipe, tmp_path):
    """2, 1, 3 and 2 ranks, each stopped by TERM after a step; the last job ends the run."""
    words = (str(recipe), *CUT, *GROUPS, "--train.steps", str(STEPS), "--losses.extra", "[tests.moments.moment]")
    assert cluster.wait(cluster.submit("train", *words, "--run.dir", str(tmp_path / "whole"), options=NODES)) == ENDED
    folder = tmp_path / "moved"
    three = ("--nodes=2", "--ntasks=3")
    for options, call, step in ((NODES, 9, 3), (("--ntasks=1",), 12, 5), (three, 4, 7)):
        moment = {"MOMENT_CALL": str(call), "MOMENT_ACT": "TERM", "MOMENT_RANK": "0"}
        job = cluster.submit("train", *words, "--run.dir", str(folder), options=options, **moment)
        assert cluster.wait(job) == "FAILED", cluster.text()
        assert (folder / "checkpoints" / "latest").read_text() == f"step-{step:06d}\n", cluster.text()
    assert cluster.wait(cluster.submit("train", *words, "--run.dir", str(folder), options=NODES)) == ENDED
    assert "was written by 3 ranks: converting it for 2" in cluster.text()
    for name in LOSSES:
        assert column(folder, name) == pytest.approx(column(tmp_path / "whole", name), rel=1e-5)
    assert [column(folder, name) for name in RATES] == [column(tmp_path / "whole", name) for name in RATES]


def test_an_array_trains_each_seed_in_its_own_folder(cluster, recipe, trained, tmp_path):
    words = (str(recipe), "--run.dir", str(tmp_path / "seed-%a"), "--run.seed", "%a")
    job = cluster.submit("train", *words, options=("--array=0-1",))
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    runs: list[Path] = sorted(tmp_path.glob("seed-*"))
    assert [run.name for run in runs] == ["seed-0", "seed-1"]
    assert losses(runs[0]) == losses(trained) != losses(runs[1]) and len(losses(runs[1])) == 8
