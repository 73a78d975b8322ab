"""The parsers of the commands. They can add options on first use, and accept settings of a recipe as options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from medalign.cli.values import count, share
from medalign.errors import ConfigError

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]


class CommandParser(argparse.ArgumentParser):
    """The parser of one command.

    Attributes:
        complete: adds options and texts that are expensive to import. It is called with the parser and the words after
            the command, and only if this command is given.
        takes_recipe: whether the command is `medalign NAME RECIPE [options] [--section.key VALUE ...]`. The namespace
            then has `recipe` (None if the first word is an option) and `overrides` (every word that is not an option of
            the command, in order).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.complete: Callable[[CommandParser, Sequence[str]], None] | None = None
        self.takes_recipe = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the words of this command. argparse calls it for the command that is given."""
        if self.complete is not None:
            complete, self.complete = self.complete, None
            complete(self, args or ())
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
        summary: one line for the list of commands and the beginning of the command's own help.
        description: the rest of the command's help.

    Returns:
        The command's parser.
    """
    parser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{description}"
    )
    parser.set_defaults(command=run)
    return parser


def add_recipe_command(subparsers: Subparsers, name: str, run: Run, summary: str, description: str) -> CommandParser:
    """Add a command that takes a recipe and settings of that recipe; see `add_command` for the arguments."""
    parser = subparsers.add_parser(name, help=summary, description=description, allow_abbrev=False, add_help=False)
    parser.takes_recipe = True
    parser.set_defaults(command=run)
    return parser


def require_recipe(arguments: argparse.Namespace, command: str) -> str:
    """Return the recipe on the command line.

    Raises:
        ConfigError: the first word of the command is not a recipe.
    """
    if arguments.recipe is None:
        from medalign.config import group_recipes

        packaged = ", ".join(group_recipes())
        raise ConfigError(
            f"the recipe is missing; give it first: medalign {command} RECIPE. Packaged recipes: {packaged}"
        )
    return str(arguments.recipe)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --student, the location of a trained student."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, a checkpoint or an export")
    parser.add_argument("--student", metavar="DIR", help="the base model's folder, if it has moved since training")


def add_max_length(parser: argparse.ArgumentParser) -> None:
    """Add --max-length, the limit of a question."""
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="maximum tokens of a question and its first image; text beyond it is cut off (default: as in training)",
    )


def add_max_skip_fraction(parser: argparse.ArgumentParser, default: float) -> None:
    """Add --max-skip-fraction."""
    parser.add_argument(
        "--max-skip-fraction",
        type=share,
        default=default,
        metavar="SHARE",
        help="stop if more than this share of the samples cannot be read; fewer than 100 samples count as 100 "
        "(default %(default)s)",
    )
