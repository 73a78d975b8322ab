"""`medalign supervise`: starts a training again after a crash."""

from __future__ import annotations

import argparse

from medalign.cli.parser import Subparsers, add_command
from medalign.cli.values import whole

_DESCRIPTION = """\
Runs a launcher's command, which ends with `medalign train RECIPE ...`, and runs it again after a crash: a rank that was
killed, failed or hung. It is not run again after success, after an error that the user can correct (status 2), or after
a stop on request (75, 143, 130). Signals reach all ranks.

In a SLURM job, run it in the batch script, around srun: the job is queued again after USR1 (status 75), and once the
restarts are used up. Each attempt with a new step renews both limits: only a run that does not advance is ended.
RUN/attempts.jsonl has the status and the reason of each attempt.

The exit status is that of the training.

examples:
  medalign supervise -- deepspeed --module medalign train RECIPE --run.dir runs/first
  medalign supervise --max-restarts 5 -- srun --kill-on-bad-exit=1 python -m medalign train RECIPE"""


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(subparsers, "supervise", run, "start a training again after a crash", _DESCRIPTION)
    parser.usage = "medalign supervise [--max-restarts N] [--max-requeues N] -- LAUNCHER ... medalign train RECIPE ..."
    parser.add_argument(
        "--max-restarts",
        type=whole,
        default=3,
        metavar="N",
        help="restarts without a new step in between; 0 is never (default %(default)s)",
    )
    parser.add_argument(
        "--max-requeues",
        type=whole,
        default=2,
        metavar="N",
        help="how often a SLURM job is queued again without a new step in between (default %(default)s)",
    )
    parser.add_argument("launcher", nargs=argparse.REMAINDER, metavar="LAUNCHER", help="command of the launcher")


def run(arguments: argparse.Namespace) -> int:
    """Run the training to its end. Returns its exit status."""
    from medalign.supervising.supervisor import Limits, supervise

    words = arguments.launcher[1:] if arguments.launcher[:1] == ["--"] else arguments.launcher
    return supervise(words, Limits(arguments.max_restarts, arguments.max_requeues))
