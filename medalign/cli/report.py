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
        "Writes score tables, loss curves and attention overlays into one self-contained file. It contains images and\n"
        "texts of the evaluation data: keep it only where the data may be kept.\n\n"
        "example: medalign report runs/language runs/medalign --output report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of evaluated runs")
    parser.add_argument("--output", type=Path, required=True, metavar="HTML", help="file to write")
    parser.add_argument(
        "--examples", type=count, default=8, metavar="N", help="example questions with pictures (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its score tables. Returns the exit status."""
    from medalign.evaluation.report.page import format_table, write_report

    write_report(arguments.runs, arguments.output, examples=arguments.examples)
    sys.stdout.write(f"{format_table(arguments.runs)}\n\nreport: {arguments.output.resolve()}\n")
    return 0
