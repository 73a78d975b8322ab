"""`medalign targets`: writes the teacher's targets into a cache that training reads."""

from __future__ import annotations

import argparse

from medalign.cli.parser import Subparsers, add_recipe_command, require_recipe

_DESCRIPTION = """\
Run the teacher once over the images of data.train and data.validation, and write what it sees into teacher.cache.
Training with the same settings reads it there: the tower does not run, and its weights are not loaded.

The log says how much of the disk an image takes before the first one is computed. Images that are in the cache are
skipped, so the same command continues after an interruption. With several ranks, each takes its part of the samples."""

_EPILOG = """\
Any setting of the recipe can be overridden; give those of the training, because the cache belongs to them.

examples:
  medalign targets phantom --data.train data/train --teacher.cache targets
  deepspeed --module medalign targets phantom --data.train data/train --teacher.cache targets
  medalign train phantom --data.train data/train --teacher.cache targets"""


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_recipe_command(subparsers, "targets", run, "write the teacher's targets into a cache", _DESCRIPTION)
    parser.usage = "medalign targets RECIPE [--section.key VALUE ...]"
    parser.epilog = _EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Write the cache. Ranks do not wait for each other. Returns the exit status."""
    recipe = require_recipe(arguments, "targets")
    from medalign.config import load

    config = load(recipe, arguments.overrides)
    from medalign import target_cache

    target_cache.write(config)
    return 0
