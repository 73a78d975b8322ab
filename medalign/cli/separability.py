"""`medalign separability`: how well the visual tokens of findings separate from the rest of the image."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from medalign.cli.parser import Subparsers, add_command, add_run
from medalign.cli.values import count

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "separability",
        run,
        "measure how well the visual tokens of findings separate, block by block",
        "Takes visual tokens inside the boxes of each image and as many outside, at the input of every block, and at\n"
        "tapped blocks also after W. Measures a linear probe (split by image), the silhouette and the labels of the\n"
        "nearest tokens of other images, each beside chance, and a probe that knows only the position of a patch.\n\n"
        "Writes separability.json, and separability.png with a t-SNE of the tapped block, into RUN/evaluation/NAME.\n"
        "It needs scikit-learn: pip install 'medalign[separability]'.\n\n"
        "example: medalign separability runs/first --data data/val --limit 200",
    )
    add_run(parser)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="a folder of shards with boxes")
    parser.add_argument("--name", metavar="NAME", help="name of the evaluation (default: of the folder of shards)")
    parser.add_argument("--limit", type=count, metavar="N", help="measure only the first N images that have boxes")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="default %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables and log where the results are written. Returns the exit status."""
    from medalign.evaluation.provenance import command_line
    from medalign.evaluation.separability_table import format_separability
    from medalign.separability import measure_separability

    path = measure_separability(
        arguments.run,
        arguments.data,
        name=arguments.name,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        base=arguments.student,
        command=command_line(arguments.words),
    )
    sys.stdout.write(format_separability(json.loads(path.read_text(encoding="utf-8"))) + "\n")
    log.info("separability: %s, %s", path, path.with_suffix(".png"))
    return 0
