"""`medalign plan`: memory, traffic, operations and time of a run, without running it."""

from __future__ import annotations

import argparse
import json
import sys

from medalign.cli.parser import Subparsers, add_recipe_command, require_recipe
from medalign.cli.values import argument_type, count, positive

_CARDS = ("a100", "h100", "h200", "b200")

_DESCRIPTION = """\
Derive what a run needs on a number of GPUs: parameters, memory per GPU by kind, bytes on the wire, operations, the
largest micro-batch that fits, and the time of a step at a stated efficiency.

No weight is read and no model is allocated. The folders of the models need only the files of their configuration
(config.json), and data.train may be missing. Every figure is derived from shapes and data sheets, and none is measured;
the documentation states the formulas, and how far they are from measured runs."""

_EPILOG = """\
Any setting of the recipe can be overridden (--train.micro_batch_size 8, ...).

examples:
  medalign plan llava_vqa --student.path models/llava --teacher.path models/clip --nodes 4 --gpus 8
  medalign plan llava_vqa --student.path models/llava --teacher.path models/clip --card h100 --samples 1797 --json"""


def _efficiency(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise ValueError(f"{text!r} is greater than 1")
    return value


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_recipe_command(subparsers, "plan", run, "derive the memory, traffic and time of a run", _DESCRIPTION)
    parser.usage = "medalign plan RECIPE [options] [--section.key VALUE ...]"
    parser.epilog = _EPILOG
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="number of nodes (default %(default)s)")
    parser.add_argument("--gpus", type=count, default=8, metavar="G", help="GPUs per node (default %(default)s)")
    parser.add_argument("--card", choices=_CARDS, help="show only this GPU (default: all)")
    parser.add_argument(
        "--efficiency",
        type=argument_type(_efficiency),
        default=0.4,
        metavar="SHARE",
        help="share of the peak (default %(default)s)",
    )
    parser.add_argument(
        "--network",
        type=positive,
        default=50.0,
        metavar="GB/S",
        help="bandwidth between nodes per GPU, in one direction (default %(default)s, 400 Gbit/s)",
    )
    parser.add_argument("--length", type=count, metavar="L", help="tokens per sample (default: data.max_length)")
    parser.add_argument(
        "--supervised", type=count, metavar="K", help="supervised tokens per sample (default: all after the image)"
    )
    parser.add_argument("--samples", type=count, metavar="S", help="training samples, for a length in train.epochs")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Returns the exit status."""
    recipe = require_recipe(arguments, "plan")
    from medalign.config import load

    config = load(recipe, arguments.overrides, data=False)
    from medalign.planning.plan import make_plan
    from medalign.planning.text import format_plan

    plan = make_plan(
        config,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        efficiency=arguments.efficiency,
        network=arguments.network * 1e9,
        length=arguments.length,
        supervised=arguments.supervised,
        samples=arguments.samples,
    )
    cards = [arguments.card] if arguments.card else list(_CARDS)
    if arguments.json:
        values = plan.as_dict()
        values["cards"] = {name: values["cards"][name] for name in cards}
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
    else:
        sys.stdout.write(format_plan(plan, cards))
    return 0
