"""`medalign recipes`: lists the packaged recipes, or shows the settings of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from medalign.cli.parser import Subparsers, add_command


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        "list the packaged recipes, or show the settings of one",
        "Without RECIPE, lists the packaged recipes, each with what it is. With RECIPE, shows its settings and those\n"
        "of the recipes that it builds on, as YAML. All other settings have their defaults.\n\n"
        "examples:\n"
        "  medalign recipes\n"
        "  medalign recipes llava_med/vqa_rad",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a packaged recipe, or the path of a YAML file")


def run(arguments: argparse.Namespace) -> int:
    """Print the list or the settings. Returns the exit status."""
    if arguments.recipe is None:
        sys.stdout.write("\n".join(_list()) + "\n")
        return 0
    import yaml

    from medalign.config.keys import nest
    from medalign.config.recipe_files import read_recipe

    sys.stdout.write(yaml.safe_dump(nest(read_recipe(arguments.recipe)), sort_keys=False))
    return 0


def _list() -> Iterator[str]:
    from medalign.config import recipes, summarize

    names = recipes()
    width = max(map(len, names))
    folder = ""
    for name in names:
        if folder != (folder := name.rpartition("/")[0]):
            yield ""
        yield f"{name:<{width}}  {summarize(name)}"
