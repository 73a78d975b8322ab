"""`medalign watch`: the latest metrics of runs in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command
from medalign.cli.values import count

_PLAIN_WIDTH = 240  # characters of a line in a file or a pipe, which no terminal limits


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "watch",
        run,
        "show the latest metrics of runs in the terminal",
        "Reads RUN/metrics.jsonl again and again and shows the newest value of each metric, with several runs beside\n"
        "each other, until Ctrl-C. It writes nothing, so it may watch runs of other users and of other nodes. In a\n"
        "terminal the table is redrawn in place. In a file or a pipe it has no color and is written again whenever\n"
        "there are new rows. The number of steps and the time left are known for runs whose length is train.steps.\n\n"
        "examples:\n"
        "  medalign watch runs/first\n"
        "  medalign watch runs/seed-* --metrics loss/ validation/\n"
        "  ssh -t login1 medalign watch runs/first\n"
        "  medalign watch runs/first --once > now.txt",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--once", action="store_true", help="show the table once")
    parser.add_argument(
        "--interval", type=count, default=2, metavar="S", help="seconds between updates (default %(default)s)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="show only metrics whose names begin with PREFIX, such as loss/",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the metrics. Returns the exit status."""
    from rich.console import Console

    from medalign.watching import watch

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False, markup=False, emoji=False)
    watch(arguments.runs, console, once=arguments.once, interval=float(arguments.interval), metrics=arguments.metrics)
    return 0
