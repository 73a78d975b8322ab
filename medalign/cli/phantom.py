"""`medalign phantom`: synthetic chest radiographs as shards."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command
from medalign.cli.values import count, share

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "phantom",
        run,
        "write synthetic chest radiographs as shards",
        "Each study has up to three findings with known boxes, a report and questions. The same seed gives the same\n"
        "bytes. Training and validation never share a study.\n\n"
        "example: medalign phantom --output data --train 2000 --val 200",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write train/ and val/ into"
    )
    parser.add_argument("--train", type=count, default=2000, metavar="N", help="training studies (default %(default)s)")
    parser.add_argument("--val", type=count, default=200, metavar="N", help="held-out studies (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the studies (default %(default)s)")
    parser.add_argument(
        "--reports",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="share of the studies with their report as a sample in addition to their questions; a report has about "
        "ten times the tokens of an answer and outweighs it in a mean over tokens (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the shards and log how many samples each split has. Returns the exit status."""
    from medalign import phantom

    reports = phantom.write_phantoms(
        arguments.output, arguments.train, arguments.val, arguments.seed, arguments.reports
    )
    for split, report in reports.items():
        log.info("%s: %d samples in %d shards", arguments.output / split, report.written, report.shards)
        for reason in report.refused:
            log.warning("refused: %s", reason)
    return 0
