"""`medalign inspect`: what a recipe will train on, as the keys of batches or as one decoded batch."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from medalign.cli.parser import Subparsers, add_recipe_command, require_recipe
from medalign.cli.values import count, whole
from medalign.errors import ConfigError

if TYPE_CHECKING:
    from medalign.config import Config
    from medalign.evaluation.report.batches import BatchView

log = logging.getLogger("medalign")

_LISTING = ("steps", "skip", "world_size", "workers")  # options that need --keys
_SHOWING = ("step", "output")  # options that exclude --keys
_PICTURE, _PAGE = (".png",), (".html", ".htm")

_DESCRIPTION = """\
Show what a recipe will train on.

With --keys: one JSON line per step, {"step": ..., "keys": [...]}, with the sample keys of the global batch in order.
No image is decoded. The part of each rank is drawn by the loader that training uses, and the parts are joined. The
lines are therefore the same for every --world-size and --workers.

Without --keys: one global batch, decoded, as the two models receive it: pictures, text with the supervised tokens in
color, spans, lengths and padding. It is shown in the terminal, or written to a page or a picture. It contains images
and texts of the data: keep it only where the data may be kept."""

_EPILOG = """\
Any setting of the recipe can be overridden (--data.train DIR, --train.batch_size 64, ...); medalign train --help
lists them.

examples:
  medalign inspect phantom --data.train data/train --keys --steps 3
  medalign inspect phantom --data.train data/train --keys --steps 40 --skip 30 --world-size 8 --workers 4
  medalign inspect phantom --data.train data/train --step 5 --output batch.html"""


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_recipe_command(
        subparsers, "inspect", run, "show what a recipe will train on: the keys of batches, or a batch", _DESCRIPTION
    )
    parser.usage = "medalign inspect RECIPE [options] [--section.key VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument("--keys", action="store_true", help="list the keys of global batches; decode no image")
    parser.add_argument("--steps", type=whole, metavar="N", help="with --keys: stop before step N (default 1)")
    parser.add_argument("--skip", type=whole, metavar="S", help="with --keys: start at step S (default 0)")
    parser.add_argument("--world-size", type=count, metavar="W", help="with --keys: number of ranks (default 1)")
    parser.add_argument(
        "--workers", type=whole, metavar="K", help="with --keys: loader workers per rank (default: the recipe's)"
    )
    parser.add_argument("--step", type=whole, metavar="S", help="without --keys: the step to show (default 0)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="without --keys: .html page or .png picture to write"
    )


def run(arguments: argparse.Namespace) -> int:
    """List keys, or show a batch. Returns the exit status."""
    recipe = require_recipe(arguments, "inspect")
    _check_options(arguments)
    from medalign.config import load

    config = load(recipe, arguments.overrides, models=not arguments.keys)
    if not config.data.folders:
        raise ConfigError("data.train is not set; give folders of shards with --data.train DIR")
    if arguments.keys:
        _print_keys(config, arguments)
    else:
        from medalign.inspection import view_global_batch

        _show(view_global_batch(config, arguments.step or 0), arguments.output)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Check that every given option has an effect.

    Raises:
        ConfigError: an option has no effect together with the others.
    """
    names = _SHOWING if arguments.keys else _LISTING
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    if given and arguments.keys:
        raise ConfigError(f"{given[0]} applies to a batch that is shown, but --keys lists only keys; omit one of them")
    if given:
        raise ConfigError(f"{given[0]} applies to a list of keys; add --keys, or omit it (--step selects the batch)")
    if arguments.output and arguments.output.suffix.lower() not in _PICTURE + _PAGE:
        raise ConfigError(f"--output {arguments.output}: give a file that ends in .html or .png")


def _print_keys(config: Config, arguments: argparse.Namespace) -> None:
    from medalign.inspection import list_keys

    skip, steps = arguments.skip or 0, 1 if arguments.steps is None else arguments.steps
    if skip >= steps:
        raise ConfigError(
            f"--skip {skip} leaves none of the {steps} steps, because the list starts at --skip and stops before "
            "--steps; raise --steps"
        )
    workers = config.data.workers if arguments.workers is None else arguments.workers
    for step, keys in list_keys(config, range(skip, steps), arguments.world_size or 1, workers):
        sys.stdout.write(json.dumps({"step": step, "keys": keys}, ensure_ascii=False) + "\n")


def _show(view: BatchView, output: Path | None) -> None:
    """Write the batch to the terminal, a page or a picture."""
    from medalign.evaluation.report.batch_formats import as_html, as_picture, as_text
    from medalign.observability.files import write_text

    if output is None:
        sys.stdout.write(as_text(view, color=_wants_color()))
        return
    try:
        if output.suffix.lower() in _PICTURE:
            output.parent.mkdir(parents=True, exist_ok=True)
            as_picture(view).save(output)
        else:
            write_text(output, as_html(view))
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from error
    log.info("batch: %s", output)


def _wants_color() -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
