"""`medalign ground`: what a student's attention shows, beyond the scores of `evaluate`."""

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
        "ground",
        run,
        "measure what a run's attention shows",
        "For the samples that have boxes, measures the attention of the question's tokens and of the answer's tokens\n"
        "against boxes and masks, each beside a uniform map; the share inside the boxes by block and head;\n"
        "and deletion and insertion: the probability of the student's own answer while patches are removed or\n"
        "restored in the order of the map, beside a random order.\n\n"
        "Writes grounding.json, grounding_heads.csv, and grounding.jsonl with a line per sample into\n"
        "RUN/evaluation/NAME. The same command continues an interrupted one.\n\n"
        "example: medalign ground runs/first --data data/val --limit 200",
    )
    add_run(parser)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="a folder of shards")
    parser.add_argument("--name", metavar="NAME", help="name of the evaluation (default: of the folder of shards)")
    parser.add_argument("--limit", type=count, metavar="N", help="measure only the first N samples that have boxes")
    parser.add_argument(
        "--steps", type=count, default=8, metavar="N", help="steps from the whole image to none (default %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="default %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the result and log where it is written. Returns the exit status."""
    from medalign.evaluation.ground_table import format_grounding
    from medalign.evaluation.provenance import command_line
    from medalign.grounding import ground

    path = ground(
        arguments.run,
        arguments.data,
        name=arguments.name,
        limit=arguments.limit,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        base=arguments.student,
        command=command_line(arguments.words),
    )
    sys.stdout.write(format_grounding(json.loads(path.read_text(encoding="utf-8"))) + "\n")
    log.info("grounding: %s", path)
    return 0
