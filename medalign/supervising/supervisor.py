"""Runs a launcher's command until the training has succeeded, or starting it again does not help."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from medalign import exit_records
from medalign.checkpoint import lock
from medalign.config import load
from medalign.errors import ConfigError, Preempted
from medalign.observability.rows import read_rows
from medalign.run_folder import RunFolder
from medalign.supervising.launched import Launched, forwarding
from medalign.supervising.verdict import Verdict, judge

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Limits:
    """How often a training that crashes is started again without a new step in between.

    Attributes:
        restarts: within this process, and so within a job; 0 is never.
        requeues: how often the SLURM job is queued again, after USR1 or once the restarts are used up.
    """

    restarts: int
    requeues: int


@dataclass(frozen=True)
class Attempt:
    """One row of attempts.jsonl.

    Attributes:
        time: when it ended (UTC, ISO 8601).
        job: number of the SLURM job, or None.
        host: the host of the supervisor.
        seconds: how long it ran.
        status: exit status.
        reason: why it did not succeed.
        step: the newest step that is logged or has a checkpoint.
        new_steps: steps beyond all earlier attempts of this supervisor and of this SLURM job.
        then: what followed: "ended", "restarted" or "requeued".
    """

    time: str
    job: str | None
    host: str
    seconds: float
    status: int
    reason: str
    step: int
    new_steps: int
    then: str


def supervise(command: Sequence[str], limits: Limits) -> int:
    """Run the command, and run it again after a crash.

    Args:
        command: a launcher's words, which end with `medalign train RECIPE ...`.
        limits: bounds of a crash loop.

    Returns:
        The exit status of the training: 75 if it is to be started again by whoever called this.

    Raises:
        ConfigError: the command trains nothing, its settings are not valid, its program does not exist, the run's
            folder cannot be used, or another training is running in it.
    """
    folder = _run_folder(command)
    with lock.held(folder.path):  # free at this moment: otherwise the steps of another training would count here
        pass
    launched = Launched()
    best, used = _furthest_step(folder), 0
    with forwarding(launched):
        while True:
            exit_records.clear(folder)
            began = time.monotonic()
            status = launched.run(command)
            verdict = judge(exit_records.read(folder), status, launched.asked)
            step = _last_step(folder)
            used = 0 if step > best else used
            then = _decide(verdict, limits, used, 0 if step > best else _requeues(folder))
            _record(folder, verdict, time.monotonic() - began, (step, max(0, step - best)), then)
            best = max(best, step)
            if then != "restarted":
                return _end(folder, verdict, then)
            used += 1
            log.warning("%s\nstarting again (%d of %d without a new step)", verdict.reason, used, limits.restarts)


def _run_folder(command: Sequence[str]) -> RunFolder:
    """Return the folder of the run that a command trains, after a check of all its settings."""
    words = list(command)
    starts = [i for i, word in enumerate(words) if word == "train" and words[i - 1].rpartition("/")[2] == "medalign"]
    if not starts or starts[0] + 1 == len(words):
        raise ConfigError(
            f"{' '.join(words) or 'an empty command'} does not contain medalign train RECIPE; example: medalign "
            "supervise -- deepspeed --module medalign train RECIPE ..."
        )
    recipe, *overrides = words[starts[0] + 1 :]
    return RunFolder(Path(load(recipe, overrides).run.dir))


def _last_step(folder: RunFolder) -> int:
    """Return the newest step that is logged or has a checkpoint."""
    rows = read_rows(folder.metrics) if folder.metrics.is_file() else []
    return max((*(row["step"] for row in rows), *folder.checkpoints.by_step()), default=0)


def _furthest_step(folder: RunFolder) -> int:
    """Return the newest step, or a later one that an earlier attempt of this job has reached.

    A start removes the rows after its checkpoint, so that the newest step may be an earlier one than before.
    """
    earlier = [row.step for row in _attempts(folder) if row.job is not None and row.job == _job()]
    return max(_last_step(folder), *earlier, 0)


def _decide(verdict: Verdict, limits: Limits, used: int, requeued: int) -> str:
    """Return what follows, "ended", "restarted" or "requeued".

    Args:
        verdict: how the start ended.
        limits: the bounds.
        used: restarts of this supervisor since the last new step.
        requeued: how often this job was queued again since the last new step.
    """
    if verdict.crashed and used < limits.restarts:
        return "restarted"
    again = verdict.crashed or verdict.status == Preempted.status
    return "requeued" if again and _job() and requeued < limits.requeues else "ended"


def _requeues(folder: RunFolder) -> int:
    """Return how often this job was queued again since the last attempt with a new step."""
    count = 0
    for row in reversed(_attempts(folder)):
        if row.job != _job() or row.new_steps:
            break
        count += row.then == "requeued"
    return count


def _attempts(folder: RunFolder) -> list[Attempt]:
    """Read the attempts so far, except a line that a full disk has cut."""
    lines = folder.attempts.read_text(encoding="utf-8").splitlines() if folder.attempts.is_file() else []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(Attempt(**json.loads(line)))
    return found


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _record(folder: RunFolder, verdict: Verdict, seconds: float, steps: tuple[int, int], then: str) -> None:
    """Append the row of an attempt; `steps` are the newest step and the number of new ones."""
    now, (step, new) = datetime.now(UTC).isoformat(timespec="seconds"), steps
    row = Attempt(now, _job(), socket.gethostname(), round(seconds, 1), verdict.status, verdict.reason, step, new, then)
    try:
        with folder.attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s): %s", folder.attempts, error.strerror or error, asdict(row))


def _end(folder: RunFolder, verdict: Verdict, then: str) -> int:
    """Queue the job again if that is to follow; returns the exit status."""
    if then == "requeued":
        log.warning("%s\nthe job is queued again", verdict.reason)
        try:
            failed = subprocess.run(["scontrol", "requeue", str(_job())], check=False).returncode > 0
        except OSError:  # as in a container, which does not have SLURM's commands
            failed = True
        if failed:  # with a status below 0, the job has ended scontrol too
            log.error("error: the job could not be queued again by scontrol; submit the same command")
        return Preempted.status
    if verdict.crashed or (verdict.status == Preempted.status and _job()):
        rows = _attempts(folder)
        last = next((i for i in range(len(rows), 0, -1) if rows[i - 1].new_steps), 0)
        reasons = "".join(f"\n  {row.time} step {row.step}: {row.reason}" for row in rows[max(0, last - 1) :])
        log.error("error: the training does not advance; its attempts since the last new step:%s", reasons)
    elif verdict.status:
        log.warning("%s", verdict.reason)
    return verdict.status
