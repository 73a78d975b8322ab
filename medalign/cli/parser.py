"""The parsers of the commands: options that are added on first use, and settings of a recipe among the options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from medalign.cli.values import count
from medalign.errors import ConfigError

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]


class CommandParser(argparse.ArgumentParser):
    """The parser of one command.

    Attributes:
        complete: adds what is expensive to import (options, texts) once this command is the one that was given.
        takes_recipe: the command is `medalign NAME RECIPE [options] [--section.key VALUE ...]`. The namespace then has
            `recipe` (None where the first word is an option) and `overrides`, every word that is not an option of the
            command, in order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.complete: Callable[[CommandParser], None] | None = None
        self.takes_recipe = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the words of this command; argparse calls it for the command that was given."""
        if self.complete is not None:
            complete, self.complete = self.complete, None
            complete(self)
        if not self.takes_recipe:
            return super().parse_known_args(args, namespace)
        words = list(args or ())
        if {"-h", "--help"} & set(words):
            self.print_help()
            self.exit()
        recipe = words.pop(0) if words and not words[0].startswith("-") else None
        namespace, overrides = super().parse_known_args(words, namespace)
        namespace.recipe, namespace.overrides = recipe, overrides
        return namespace, []


def add_command(subparsers: Subparsers, name: str, run: Run, summary: str, description: str = "") -> CommandParser:
    """Add a command to `medalign`.

    Args:
        subparsers: the commands of `medalign`.
        name: the word after `medalign`.
        run: runs the command with the parsed arguments; returns the exit status.
        summary: one line for the list of commands, which also opens the command's own help.
        description: what the command's help says after the summary.
    """
    parser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{description}"
    )
    parser.set_defaults(command=run)
    return parser


def add_recipe_command(subparsers: Subparsers, name: str, run: Run, summary: str, description: str) -> CommandParser:
    """Add a command whose first word is a recipe and whose other words may be settings of that recipe."""
    parser = subparsers.add_parser(name, help=summary, description=description, allow_abbrev=False, add_help=False)
    parser.takes_recipe = True
    parser.set_defaults(command=run)
    return parser


def require_recipe(arguments: argparse.Namespace, command: str) -> str:
    """The recipe that was named. Raises ConfigError if the first word of the command is not one."""
    if arguments.recipe is None:
        from medalign.config import recipes

        raise ConfigError(f"name a recipe first: medalign {command} RECIPE; packaged are {', '.join(recipes())}")
    return str(arguments.recipe)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --student, which say where a trained student is."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, a checkpoint or an export")
    parser.add_argument("--student", metavar="DIR", help="the base model's folder, if it has moved since training")


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Add --max-length and --max-new-tokens, the limits of a question and of its answer."""
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="longest question in tokens, its first image included; text beyond it is cut (default: as in training)",
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (default %(default)s)"
    )
