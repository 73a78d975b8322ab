"""A crash is followed by another start, within bounds; nothing else is. Real processes, without ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from medalign.cli.main import main
from medalign.errors import ConfigError
from medalign.supervising.supervisor import Limits, supervise

LAUNCHER = Path(__file__).with_name("launcher.py")
HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(flush=True)
    time.sleep(60)
"""
DONE = {"status": 0, "records": [{"rank": 0, "status": 0}, {"rank": 1, "status": 0}]}
KILLED = {"status": 143, "records": [{"rank": 0, "status": 1, "reason": "RuntimeError: Connection closed"}]}


class Run:
    """A run in a folder, whose launcher does what a plan says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plan = folder / "run", folder / "plan.json"
        self.folder.mkdir()

    def command(self, *starts: dict) -> list[str]:
        self.plan.write_text(json.dumps(starts))
        train = ["medalign", "train", "phantom", "--data.train", "shards", "--run.dir", str(self.folder)]
        return [sys.executable, str(LAUNCHER), str(self.plan), *train]

    def supervise(self, *starts: dict, restarts: int = 2, requeues: int = 0) -> int:
        return supervise(self.command(*starts), Limits(restarts, requeues))

    def attempts(self, *names: str) -> list[tuple]:
        rows = [json.loads(line) for line in (self.folder / "attempts.jsonl").read_text().splitlines()]
        return [tuple(row[name] for name in names) for row in rows]

    def left(self) -> int:
        return len(json.loads(self.plan.read_text()))


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return Run(tmp_path)


def test_a_crash_is_followed_by_another_start_and_recorded(run):
    assert run.supervise(KILLED | {"step": 3}, DONE | {"step": 8}) == 0
    assert run.attempts("status", "step", "new_steps", "then") == [(1, 3, 3, "restarted"), (0, 8, 5, "ended")]
    assert "RuntimeError: Connection closed; no reason from rank 1: killed" in run.attempts("reason")[0][0]


@pytest.mark.parametrize("status", [2, 75, 143, 130])
def test_an_error_of_the_user_and_a_request_to_end_are_final(run, status):
    assert run.supervise({"status": 143, "records": [{"rank": 1, "status": status, "reason": "why"}]}, DONE) == status
    assert run.left() == 1 and run.attempts("reason", "then") == [("rank 1: why", "ended")]


def test_a_crash_loop_ends_with_the_reason_of_each_attempt(run, caplog):
    """The first start has new steps, and two restarts follow it."""
    assert run.supervise(*[KILLED | {"step": 4}] * 4) == 1
    assert run.left() == 1
    assert run.attempts("new_steps", "then") == [(4, "restarted"), (0, "restarted"), (0, "ended")]
    assert caplog.messages[-1].count("Connection closed") == 3


def test_each_new_step_renews_the_restarts(run):
    starts = [KILLED | {"step": step} for step in (1, 2, 3, 4, 5, 6)]
    assert run.supervise(*starts, DONE, restarts=1) == 0
    assert run.left() == 0


def test_a_run_that_is_in_use_is_refused_before_any_start(run):
    """Its new steps would renew the restarts, and its records of exits would be removed."""
    words = run.command(DONE)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.folder / "lock")], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="another training is running in"):
            supervise(words, Limits(2, 0))
        holder.kill()
    assert run.left() == 1 and not (run.folder / "attempts.jsonl").exists()


def test_a_file_in_place_of_the_folder_is_refused_before_any_start(run):
    run.folder.rmdir()
    run.folder.touch()
    with pytest.raises(ConfigError, match="is a file; choose a folder with --run.dir"):
        run.supervise(DONE)
    assert run.left() == 1


def test_no_restart_is_possible(run):
    assert run.supervise(KILLED | {"step": 4}, DONE, restarts=0) == 1
    assert run.left() == 1


def test_records_of_an_earlier_start_do_not_count(run):
    assert run.supervise(KILLED, {"status": 137}, DONE) == 0
    assert "no rank has left a reason" in run.attempts("reason")[1][0]


@pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_reach_what_a_launcher_has_started(run, name, status):
    """The launcher is a shell, which does not pass signals on."""
    rank = {"status": 1, "wait": name, "records": [{"rank": 0, "status": status, "reason": "stopped"}]}
    words = run.command(rank, DONE)
    threading.Thread(target=_signal_when_ready, args=(run.folder / "ready", signal.Signals[name])).start()
    assert supervise(["bash", "-c", '"$@"; exit 1', "bash", *words], Limits(2, 0)) == status
    assert run.left() == 1


def test_a_rank_that_outlives_a_launcher_that_has_crashed_is_killed(run):
    """It would hold the lock of the run, so that the next start is refused."""
    assert run.supervise(KILLED | {"leave": "exec sleep 60"}, restarts=0) == 1
    assert not psutil.pid_exists(int((run.folder / "left").read_text()))


def test_a_rank_that_outlives_a_launcher_after_a_signal_is_waited_for(run):
    """It writes its checkpoint."""
    rank = {"status": 1, "wait": "SIGTERM", "leave": "trap '' TERM; sleep 1; touch saved"}
    words = run.command(rank, DONE)
    threading.Thread(target=_signal_when_ready, args=(run.folder / "ready", signal.SIGTERM)).start()
    assert supervise(words, Limits(2, 0)) == 143
    assert (run.folder / "saved").exists()


def test_other_children_of_this_process_are_left_alone(run):
    with subprocess.Popen(["sleep", "60"]) as other:
        assert run.supervise(KILLED, restarts=0) == 1
        assert other.poll() is None
        other.kill()


def _signal_when_ready(ready: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


class TestJobs:
    """In a SLURM job, with a stand-in for `scontrol`."""

    @pytest.fixture(autouse=True)
    def job(self, tmp_path, monkeypatch) -> Path:
        calls = tmp_path / "calls"
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
        return calls

    @pytest.fixture
    def run(self, tmp_path, monkeypatch) -> Run:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        return Run(tmp_path)

    def test_a_job_is_queued_again_after_usr1_as_long_as_it_advances(self, run, job):
        """A time limit that is shorter than the start of the run must not queue the job for ever."""
        asked = {"status": 143, "records": [{"rank": 0, "status": 75, "reason": "SIGUSR1"}]}
        for step in (1, 2, 3):
            assert run.supervise(asked | {"step": step}, requeues=1) == 75
        assert [run.supervise(asked | {"step": 3}, requeues=1) for _ in range(2)] == [75, 75]
        assert job.read_text() == "requeue 17\n" * 4
        assert run.attempts("then") == [("requeued",)] * 4 + [("ended",)]

    def test_a_checkpoint_is_a_new_step_too(self, run, job):
        """Rows are written every few steps only."""
        for step in (1, 2):
            assert run.supervise(KILLED | {"checkpoint": step}, restarts=0, requeues=1) == 75
        assert run.attempts("step", "new_steps") == [(1, 1), (2, 1)]

    def test_a_job_is_queued_again_once_the_restarts_are_used_up(self, run, job, monkeypatch):
        """One restart and one requeue: four starts without a new step. Another job begins anew."""
        assert run.supervise(KILLED, KILLED, restarts=1, requeues=1) == 75
        assert run.supervise(KILLED, KILLED, restarts=1, requeues=1) == 1
        assert run.attempts("then") == [("restarted",), ("requeued",), ("restarted",), ("ended",)]
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        assert run.supervise(KILLED, KILLED, restarts=1, requeues=1) == 75
        assert job.read_text() == "requeue 17\nrequeue 18\n"

    def test_an_attempt_that_repeats_the_steps_of_an_earlier_one_has_no_new_step(self, run, job, monkeypatch):
        """A start removes the rows after its checkpoint. Crashes at varying steps must not queue the job for ever."""
        for step, status in ((8, 75), (3, 75), (7, 75), (2, 1)):
            assert run.supervise(KILLED | {"step": step}, restarts=0, requeues=2) == status
        assert run.attempts("new_steps", "then") == [(8, "requeued"), *[(0, "requeued")] * 2, (0, "ended")]
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        assert run.supervise(KILLED | {"step": 4}, restarts=0, requeues=2) == 75

    def test_without_scontrol_the_user_is_asked_to_submit_the_job_again(self, run, job, monkeypatch, caplog):
        monkeypatch.setenv("PATH", "/nowhere")
        assert run.supervise(KILLED, restarts=0, requeues=1) == 75
        assert caplog.messages[-1].endswith("could not be queued again by scontrol; submit the same command")

    def test_a_new_step_renews_the_requeues(self, run, job):
        assert run.supervise(KILLED, restarts=0, requeues=1) == 75
        assert run.supervise(KILLED | {"step": 1}, restarts=0, requeues=1) == 75
        assert run.supervise(KILLED, restarts=0, requeues=1) == 75
        assert run.supervise(KILLED, restarts=0, requeues=1) == 1

    @pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGINT", 130)])
    def test_signals_reach_a_launcher_that_srun_has_not_started(self, run, name, status):
        """As in `salloc`: nobody else would end it."""
        test_signals_reach_what_a_launcher_has_started(run, name, status)

    @pytest.mark.parametrize(("name", "passed"), [("SIGINT", True), ("SIGTERM", False)])
    def test_srun_gets_everything_but_term(self, run, tmp_path, name, passed):
        """It would kill the ranks, to which SLURM sends TERM itself."""
        srun = tmp_path / "bin" / "srun"
        srun.write_text(
            f'#!/bin/sh\ntrap "touch {run.folder}/passed; exit 1" {name[3:]}\ntouch {run.folder}/ready\n'
            f"for i in 1 2 3 4 5; do sleep 0.2; done\nexit 1\n"
        )
        srun.chmod(0o755)
        words = ["srun", *run.command()[3:]]
        threading.Thread(target=_signal_when_ready, args=(run.folder / "ready", signal.Signals[name])).start()
        assert supervise(words, Limits(2, 0)) == 128 + signal.Signals[name]
        assert (run.folder / "passed").exists() == passed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "an empty command does not contain medalign train RECIPE"),
        (["srun", "python", "-m", "medalign", "evaluate", "runs/x"], "does not contain medalign train RECIPE"),
        (["srun", "python", "-m", "medalign", "train"], "does not contain medalign train RECIPE"),
        (["/nowhere/medalign", "train", "phantom", "--data.train", "x"], "/nowhere/medalign cannot be started"),
        (["medalign", "train", "phantom", "--train.step", "3"], "train.steps"),
    ],
)
def test_a_command_that_cannot_train_is_refused(command, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        supervise([*command, *(["--run.dir", str(tmp_path)] if "phantom" in command else [])], Limits(3, 0))


def test_the_command_line(run, capsys):
    words = run.command(KILLED, KILLED, DONE)
    assert main(["supervise", "--max-restarts", "1", "--", *words]) == 1
    assert "error: the training does not advance" in capsys.readouterr().err
    assert main(["supervise", "--max-restarts", "0", *words]) == 0
