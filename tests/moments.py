"""A loss term that trains nothing and does something to the run at a given moment.

`losses.extra: [tests.moments.moment]` adds it. The environment says when and what: MOMENT_CALL is the number of the
micro-batch of this start (those of a validation count too), MOMENT_RANK the rank, and MOMENT_ACT one of

- a signal such as KILL or USR1: the rank sends it to itself;
- "wait": the rank waits until a signal has asked it to stop, at most two minutes.

Only the first start of a SLURM job has such a moment; one that is queued again does not. If MOMENT_ONCE names a file,
only the first start that reaches the moment has it: it creates the file.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from medalign.config import Config
from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets
from medalign.losses import LossTerm
from medalign.stop_signals import StopSignals


class Moment(LossTerm):
    """Zero, with coefficient 0."""

    def __init__(self) -> None:
        super().__init__("moment", 0.0)
        self.calls = 0

    def count(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        here = os.environ["RANK"] == os.environ.get("MOMENT_RANK", "1")
        first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        now = self.calls == int(os.environ.get("MOMENT_CALL", "0"))
        if here and first and now and only_now(os.environ.get("MOMENT_ONCE")):
            act(os.environ["MOMENT_ACT"])
        return torch.ones((), device=batch.input_ids.device)

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue:
        zero = torch.zeros((), device=batch.input_ids.device)
        return LossValue(sum=zero, count=zero + 1)


def only_now(path: str | None) -> bool:
    """Return whether no start has called this with the same file."""
    if path is None:
        return True
    before = Path(path).exists()
    Path(path).touch()
    return not before


def act(name: str) -> None:
    if name != "wait":
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        return
    received: StopSignals = signal.getsignal(signal.SIGTERM).__self__
    deadline = time.monotonic() + 120
    while received.request is None and time.monotonic() < deadline:
        time.sleep(0.05)


def moment(config: Config) -> LossTerm:
    """What `losses.extra` names."""
    return Moment()
