"""`medalign wandb sync`: the metrics of a run to a W&B server."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from medalign.cli.parser import Subparsers, add_command
from medalign.errors import ConfigError

if TYPE_CHECKING:
    from medalign.run_folder import RunFolder

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "wandb",
        run,
        "send the metrics of a run to Weights & Biases",
        "`medalign wandb sync RUN` sends every row of RUN/metrics.jsonl that the run on the server does not have yet,\n"
        "whatever the run logged offline and however often it was started: there is one run, with each step once.\n"
        "With --evaluations, the scores of RUN/evaluation/NAME/scores.json are sent too, as evaluation/NAME/SCORE; no\n"
        "prediction, text or image is.",
    )
    parser.add_argument("action", choices=("sync",), help="what to do")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--evaluations",
        action="store_true",
        help="send the scores of the run's evaluations, under the names of the evaluations",
    )


def run(arguments: argparse.Namespace) -> int:
    """Send the rows. Returns the exit status."""
    from medalign import config
    from medalign.observability.rows import read_rows
    from medalign.observability.wandb_sink import sync
    from medalign.run_folder import RunFolder
    from medalign.training.loggers import wandb_session

    folder = RunFolder(arguments.run)
    settings = config.read(folder.config)
    if not folder.metrics.is_file():
        raise ConfigError(f"{folder.metrics} does not exist: {folder.path} has no metrics to send")
    summary = evaluation_scores(folder) if arguments.evaluations else {}
    sent = sync(wandb_session(settings, folder.path), read_rows(folder.metrics), summary)
    if sent is None:
        raise ConfigError(f"{folder.path} was not sent; log in with `wandb login`, and check the network")
    log.info("%s: %d steps and %d scores sent", folder.path, sent, len(summary))
    return 0


def evaluation_scores(folder: RunFolder) -> dict[str, float]:
    """Return the scores of a run's evaluations, by `evaluation/NAME/SCORE`.

    Raises:
        DataError: a file of scores cannot be read.
    """
    from medalign.evaluation.scores_file import FACTS, read_scores

    return {
        f"evaluation/{evaluation.path.name}/{name}": value
        for evaluation in folder.evaluations()
        for name, value in read_scores(evaluation.scores).items()
        if name not in FACTS and isinstance(value, int | float)
    }
