"""`medalign compare`: paired differences between systems, with intervals and tests."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "compare",
        run,
        "compare systems on the same samples: differences, intervals, tests",
        "Compares every arm with the first one: the paired difference of each score with a 95 % bootstrap interval\n"
        "and a permutation test by cluster, McNemar's test for scores of right and wrong, and Holm's adjustment over\n"
        "all that is compared. An arm with several seeds is one row with the seed as the unit: t-interval and paired\n"
        "t-test.\n\n"
        "example: medalign compare base=runs/base ours=runs/medalign --name val\n"
        "example: medalign compare base=runs/b0,runs/b1,runs/b2 ours=runs/m0,runs/m1,runs/m2",
    )
    parser.add_argument(
        "arms",
        nargs="+",
        metavar="ARM",
        help="NAME=PATH, or NAME=PATH,PATH,... with one path per seed: a file of predictions, the folder of an "
        "evaluation, or a run",
    )
    parser.add_argument("--name", metavar="NAME", help="which evaluation of a run, if it has several")
    parser.add_argument(
        "--by",
        default="image",
        choices=("image", "patient", "key"),
        help="samples of one image or patient stay together; key takes samples as independent (default %(default)s)",
    )
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="scores to compare (default: all with samples)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the numbers")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print the table. Returns the exit status."""
    from medalign.errors import ConfigError
    from medalign.evaluation.comparison import compare, format_comparisons, read_arm
    from medalign.evaluation.comparison.compare import as_data
    from medalign.evaluation.comparison.measures import MEASURES
    from medalign.observability.files import write_text

    for name in arguments.metrics or ():
        if name not in MEASURES:
            raise ConfigError(f"--metrics {name} is not known; choose from {', '.join(MEASURES)}")
    arms = [read_arm(word, arguments.name) for word in arguments.arms]
    found = compare(arms, arguments.by, arguments.metrics)
    sys.stdout.write(format_comparisons(found) + "\n")
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(as_data(arms, found), indent=2) + "\n")
    return 0
