"""`medalign score`: the scores of files of predictions."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "score",
        run,
        "score predictions again, or those of another system",
        "Writes the scores beside each file of predictions: scores.json for predictions.jsonl, NAME.scores.json for\n"
        "any other NAME.jsonl. The same predictions give the same file. Data, settings and provenance that an\n"
        "evaluation wrote are kept.\n\n"
        "A line of the file is a JSON object with key, task (vqa or report), question, answer (the reference) and\n"
        "prediction; answer_type (closed or open) and the other fields of predictions.jsonl are optional.\n\n"
        "example: medalign score runs/first/evaluation/val other.jsonl",
    )
    parser.add_argument(
        "predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="JSON lines, or folders of evaluations"
    )
    parser.add_argument(
        "--coco", action="store_true", help="add BLEU, ROUGE-L, CIDEr and METEOR of reports by COCO's evaluation (Java)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, print the table and log where the scores are written. Returns the exit status."""
    from medalign.evaluation.report.page import format_scored
    from medalign.evaluation.scores_file import rescore

    paths = list(dict.fromkeys(rescore(path, arguments.coco) for path in arguments.predictions))
    sys.stdout.write(format_scored(paths) + "\n")
    log.info("scores: %s", ", ".join(map(str, paths)))
    return 0
