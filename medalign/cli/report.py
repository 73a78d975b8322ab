"""`medalign report`: one HTML file that compares runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command
from medalign.cli.values import count


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "report",
        run,
        "write an HTML report that compares runs",
        "Writes score tables, paired differences, an error gallery with attention maps, loss curves and provenance\n"
        "into one self-contained file. Every arm is compared with the first one. The page contains images and texts\n"
        "of the evaluation data: keep it only where the data may be kept.\n\n"
        "example: medalign report runs/language runs/medalign --output report.html\n"
        "example: medalign report L=runs/l0,runs/l1,runs/l2 B=runs/b0,runs/b1,runs/b2 --output report.html",
    )
    parser.add_argument(
        "arms",
        nargs="+",
        metavar="ARM",
        help="folders of evaluated runs: PATH, NAME=PATH, or NAME=PATH,PATH,... with one run per seed",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="HTML", help="file to write")
    parser.add_argument(
        "--name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="evaluations to show, in this order; the title is about the first one (default: all)",
    )
    parser.add_argument(
        "--examples", type=count, default=2, metavar="N", help="example questions of each kind (default %(default)s)"
    )
    parser.add_argument(
        "--by",
        default="image",
        choices=("image", "patient", "key"),
        help="what makes samples dependent in the comparison; key takes them as independent (default %(default)s)",
    )
    parser.add_argument(
        "--no-teacher-maps", action="store_true", help="do not load the teacher to show its maps beside the answers"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and print its score tables and its title. Returns the exit status."""
    from medalign.evaluation.report.page import format_table, write_report
    from medalign.teacher_maps import teacher_maps

    title = write_report(
        arguments.arms,
        arguments.output,
        names=arguments.name,
        examples=arguments.examples,
        by=arguments.by,
        teacher_maps=None if arguments.no_teacher_maps else teacher_maps,
    )
    sys.stdout.write(
        f"{format_table(arguments.arms, arguments.name)}\n\n{title}\n\nreport: {arguments.output.resolve()}\n"
    )
    return 0
