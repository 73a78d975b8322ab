"""The batch scripts on a real cluster: to the end, through a time limit, scancel and a killed rank, and in arrays."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import losses
from tests.slurm.conftest import WORDS

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
    """The limit is 3 minutes, and USR1 arrives after one, in step 4."""
    folder, options = tmp_path / "run", (*NODES, "--time=3", "--signal=USR1@120")
    words = (str(recipe), "--run.dir", str(folder), *WORDS)
    job = cluster.submit("train", *words, options=options, MOMENT_CALL="4", MOMENT_ACT="wait")
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    text = cluster.text()
    assert f"SIGUSR1: {SAID}" in text and "resuming from" in text and "step-000004" in text  # the log is appended to
    assert losses(folder) == losses(whole)


def test_a_canceled_job_and_a_killed_rank_resume_exactly(cluster, recipe, whole, tmp_path):
    """After scancel in step 4, a run writes a checkpoint and is not queued again; then KILL ends rank 1 in step 6."""
    folder = tmp_path / "run"
    words = (str(recipe), "--run.dir", str(folder), *WORDS)
    job = cluster.submit("train", *words, options=NODES, MOMENT_CALL="4", MOMENT_ACT="wait")
    cluster.wait_for_row(job, folder, 3)
    cluster.scancel(job)
    assert cluster.wait(job) == "CANCELLED"
    assert (folder / "checkpoints" / "latest").read_text() == "step-000004\n" and f"SIGTERM: {SAID}" in cluster.text()
    job = cluster.submit("train", *words, options=NODES, MOMENT_CALL="2", MOMENT_ACT="KILL")
    assert cluster.wait(job) == "FAILED"
    assert [row[0] for row in losses(folder)] == [1, 2, 3, 4, 5]
    job = cluster.submit("train", *words, options=NODES)
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    assert losses(folder) == losses(whole)


def test_an_array_trains_each_seed_in_its_own_folder(cluster, recipe, trained, tmp_path):
    words = (str(recipe), "--run.dir", str(tmp_path / "seed-%a"), "--run.seed", "%a")
    job = cluster.submit("train", *words, options=("--array=0-1",))
    assert cluster.wait(job) == "COMPLETED", cluster.text()
    runs: list[Path] = sorted(tmp_path.glob("seed-*"))
    assert [run.name for run in runs] == ["seed-0", "seed-1"]
    assert losses(runs[0]) == losses(trained) != losses(runs[1]) and len(losses(runs[1])) == 8
