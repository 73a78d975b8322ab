"""`medalign train`: trains a student from a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from medalign.cli.parser import CommandParser, Subparsers, add_recipe_command, require_recipe
from medalign.errors import MedAlignError

_SUMMARY = "train a student from a recipe"


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_recipe_command(subparsers, "train", run, _SUMMARY, _SUMMARY)
    parser.usage = "medalign train RECIPE [--section.key VALUE ...]"
    parser.complete = _describe


def run(arguments: argparse.Namespace) -> int:
    """Train with the settings of the recipe and the command line. Every rank must call it. Returns the exit status."""
    recipe = require_recipe(arguments, "train")
    from medalign.config import load

    config = load(recipe, arguments.overrides)
    from medalign import distributed
    from medalign.run import train
    from medalign.stop_signals import ignore_stop_signals

    try:
        train(config)
    except MedAlignError:  # on all ranks: the others must not be ended before they have returned their status
        if distributed.world_size() > 1:
            ignore_stop_signals()
        raise
    return 0


def _describe(parser: CommandParser, _words: Sequence[str]) -> None:
    from medalign.config import describe_settings, group_recipes

    packaged = "\n".join(f"  {group}" for group in group_recipes())
    parser.description = (
        "Train a student from a recipe.\n\n"
        "RECIPE is the path of a YAML file, or a packaged recipe (`medalign recipes` says what each one is):\n"
        f"{packaged}\n\n"
        "Any setting below can be overridden. Running the same command again resumes from the latest checkpoint.\n\n"
        "on all GPUs of a node:  deepspeed --module medalign train RECIPE ...\n"
        "under SLURM:            srun --kill-on-bad-exit=1 python -m medalign train RECIPE ...\n"
        "on one rank:            medalign train RECIPE ...\n\n" + describe_settings()
    )
