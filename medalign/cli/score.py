"""`medalign score`: the scores of files of predictions."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from functools import partial
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
        "example: medalign score runs/first/evaluation/val other.jsonl\n"
        "         medalign score other.jsonl --models bertscore=models/roberta-large",
    )
    parser.add_argument(
        "predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="JSON lines, or folders of evaluations"
    )
    parser.add_argument(
        "--coco", action="store_true", help="add BLEU, ROUGE-L, CIDEr and METEOR of reports by COCO's evaluation (Java)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="add scores of reports by models in local folders: bertscore=FOLDER[:LAYER], chexbert=FOLDER, "
        "radgraph=FOLDER, ratescore=FOLDER, through the packages of their authors; nothing is downloaded",
    )
    parser.add_argument(
        "--models-python",
        metavar="FILE",
        help="interpreter of the environment that has these packages (default: this one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, print the table and log where the scores are written. Returns the exit status."""
    from medalign.errors import ConfigError
    from medalign.evaluation.metrics.coco import coco_scores
    from medalign.evaluation.report.page import format_scored
    from medalign.evaluation.scores_file import Further, read_scores, rescore
    from medalign.evaluation.text_models import TextModel, model_scores

    further: list[Further] = [coco_scores] if arguments.coco else []
    models = [TextModel.parse(text) for text in arguments.models]
    for name, times in Counter(model.name for model in models).items():
        if times > 1:
            raise ConfigError(f"--models names {name} {times} times; name each score once")
    if models:
        further.append(partial(model_scores, models, python=arguments.models_python or sys.executable))
    elif arguments.models_python:
        raise ConfigError("--models-python has no effect without --models; add the models, or leave it out")
    paths = list(dict.fromkeys(rescore(path, further) for path in arguments.predictions))
    sys.stdout.write(format_scored(paths) + "\n")
    for path in paths:
        for name, reason in read_scores(path).get("not_available", {}).items():
            log.warning("%s: %s is not available: %s", path, name, reason)
    log.info("scores: %s", ", ".join(map(str, paths)))
    return 0
