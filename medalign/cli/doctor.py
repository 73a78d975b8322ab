"""`medalign doctor`: checks a machine and a recipe before a run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from medalign.cli.parser import Subparsers, add_recipe_command, require_recipe
from medalign.cli.values import count

_DESCRIPTION = """\
Check what a run needs, on the machine and with the settings of the run: versions, GPU and driver, attention, NCCL, the
run's folder, free space for checkpoints, shards and how fast they are read, student, chat template, teacher, grids,
kernels against their reference, and W&B if log.wandb is online. Each check states what is wrong and the remedy.

Run it before the queue on a login node (where a missing GPU is a warning), and inside the job with the launcher of the
training: then every rank checks its own node, ranks connect to each other, and rank 0 reports for all.

Exit status: 0 without errors (warnings included), 1 with an error, 2 if the recipe or an option is not valid."""

_EPILOG = """\
Any setting of the recipe can be overridden (--data.train DIR, ...).

examples:
  medalign doctor phantom --data.train data/train
  medalign doctor phantom --data.train data/train --nodes 2 --gpus 8
  srun python -m medalign doctor phantom --data.train data/train --json"""


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_recipe_command(subparsers, "doctor", run, "check the machine and a recipe before a run", _DESCRIPTION)
    parser.usage = "medalign doctor RECIPE [options] [--section.key VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "--nodes", type=count, metavar="N", help="nodes of the planned run (default: those of this job)"
    )
    parser.add_argument("--gpus", type=count, metavar="G", help="GPUs per node of the planned run")
    parser.add_argument("--json", action="store_true", help="print one JSON list of findings")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings. Inside a job every rank must call it. Returns the exit status."""
    recipe = require_recipe(arguments, "doctor")
    from medalign import distributed
    from medalign.config import load

    config = load(recipe, arguments.overrides)
    distributed.adopt_launcher()
    from medalign.doctor.doctor import diagnose
    from medalign.doctor.finding import worst

    found = []
    for finding in diagnose(config, arguments.nodes, arguments.gpus):
        found.append(finding)
        if not arguments.json:
            remedy = f"\n{'':24}-> {finding.remedy}" if finding.remedy else ""
            sys.stdout.write(f"{finding.status:<8}{finding.name:<16}{finding.detail}{remedy}\n")
            sys.stdout.flush()  # a slow check shows which one it is
    if arguments.json and distributed.is_main():
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    return int(worst(found) == "error")
