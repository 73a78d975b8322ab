"""`medalign evaluate`: the scores of a run on held-out shards."""

from __future__ import annotations

import argparse
import logging
import sys

from medalign.cli.decoding import add_decoding, read_decodings
from medalign.cli.parser import Subparsers, add_command, add_max_length, add_max_skip_fraction, add_run
from medalign.cli.ranks import status_on_all_ranks
from medalign.cli.values import count
from medalign.evaluation.probes.catalog import PROBES

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        "score a run on held-out shards",
        "Writes RUN/evaluation/NAME/predictions.jsonl and scores.json, and prints the scores: closed accuracy, open\n"
        "recall, BLEU and ROUGE-L of reports, and for samples with boxes the share of the question's attention inside\n"
        "them (at the tapped block) and the pointing game. Counts answers that are empty or cut off at\n"
        "--max-new-tokens. For a checkpoint RUN/checkpoints/step-N, NAME begins with step-N. After an\n"
        "interruption, the same command continues it, also on another number of ranks. Each method of --decoding\n"
        "gives an evaluation of its own, NAME-METHOD for all but greedy.\n\n"
        "on one GPU, or without one:  medalign evaluate runs/first --data data/val\n"
        "on all GPUs of a node:       deepspeed --module medalign evaluate runs/first --data data/val\n"
        "under SLURM:                 srun --kill-on-bad-exit=1 python -m medalign evaluate runs/first --data data/val",
    )
    add_run(parser)
    add_max_length(parser)
    add_decoding(parser, several=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="SHARDS", help="folders of shards")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the evaluation (default: of the first folder); an evaluation with this name is replaced unless "
        "it has more samples",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation of more samples, too")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="default %(default)s")
    parser.add_argument("--limit", type=count, metavar="N", help="score only the first N samples")
    add_max_skip_fraction(parser, 0.01)
    width = max(map(len, PROBES))
    group = parser.add_argument_group(
        "probes",
        "Asked after the answers, each into probe-NAME.jsonl beside predictions.jsonl, with scores under `probes`\n"
        "in scores.json. A finished evaluation is kept, and only the probes that are missing are asked.\n\n"
        + "\n".join(f"  {name:{width}}  {line}" for name, line in PROBES.items()),
    )
    group.add_argument(
        "--probes",
        nargs="*",
        default=(),
        choices=PROBES,
        metavar="NAME",
        help="these probes, or all of them without a name. What the data do not allow is left out and counted",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table of scores and log where it is written, on rank 0. Returns the exit status."""
    from medalign import distributed
    from medalign.evaluation.probes.table import format_probes
    from medalign.evaluation.provenance import command_line
    from medalign.evaluation.report.page import format_evaluation
    from medalign.evaluator import evaluate_each
    from medalign.run_folder import RunFolder

    with status_on_all_ranks():
        folders = evaluate_each(
            arguments.run,
            arguments.data,
            read_decodings(arguments),
            name=arguments.name,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            max_length=arguments.max_length,
            max_skip_fraction=arguments.max_skip_fraction,
            base=arguments.student,
            overwrite=arguments.overwrite,
            probes=list(PROBES) if arguments.probes == [] else list(dict.fromkeys(arguments.probes)),
            command=command_line(arguments.words),
        )
    if not distributed.is_main():
        return 0
    for folder in folders:
        sys.stdout.write(format_evaluation(folder) + "\n" + format_probes(folder))
    others = len(RunFolder(folders[0].parents[1]).evaluations()) - len(folders)
    note = f"; {others} more in {folders[0].parent}, medalign report shows them all" if others else ""
    log.info("predictions and scores: %s%s", ", ".join(map(str, folders)), note)
    return 0
