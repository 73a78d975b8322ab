"""The `medalign` command: parses the command line, runs a command, and converts errors to an exit status."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from medalign import __version__
from medalign.cli import (
    bench,
    compare,
    dashboard,
    doctor,
    evaluate,
    export,
    generate,
    ground,
    inspect,
    phantom,
    plan,
    recipes,
    report,
    score,
    separability,
    shards,
    supervise,
    targets,
    train,
    wandb,
    watch,
)
from medalign.cli.parser import CommandParser
from medalign.errors import MedAlignError, Stopped, exit_status, format_os_error

log = logging.getLogger("medalign")

COMMANDS = (
    phantom,
    shards,
    recipes,
    inspect,
    plan,
    doctor,
    targets,
    train,
    supervise,
    watch,
    generate,
    evaluate,
    ground,
    separability,
    score,
    compare,
    report,
    export,
    bench,
    wandb,
    dashboard,
)

_EPILOG = """
a first run, from synthetic data to a report:
  medalign phantom --output data --train 2000 --val 200
  deepspeed --module medalign train phantom --data.train data/train --run.dir runs/first
  medalign evaluate runs/first --data data/val
  medalign report runs/first --output report.html
"""


def run() -> NoReturn:
    """Run one command and end the process.

    A rank ends without the interpreter's last step, in which threads of gloo that outlive their process group can abort
    a process that has finished.
    """
    status = main()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    atexit._run_exitfuncs()  # ends reading processes, flushes logs
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `medalign`; by default, those of this process.

    Returns:
        The exit status: 0; 2 after an error that the user can correct; 130 after an interrupt; 75 or 143 after a signal
        that stopped a training with a checkpoint.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher inserts its own option; the rank comes from the environment.
    words = [word for word in words if not word.startswith("--local_rank")]
    try:
        chosen = build_parser().parse_args(words)
        chosen.words = words  # some commands record how they were called
        from medalign import distributed  # imports torch, which --help does without

        distributed.set_up_logging()
        return int(chosen.command(chosen))
    except Stopped as stopped:
        log.warning("%s", stopped)
        return exit_status(stopped)
    except MedAlignError as error:
        log.error("error: %s", error)
        return exit_status(error)
    except OSError as error:  # a file that cannot be read or written, without a more specific message
        log.error("error: %s", format_os_error(error))
        return exit_status(error)
    except KeyboardInterrupt as error:
        log.error("interrupted")
        return exit_status(error)


def build_parser() -> CommandParser:
    """Build the parser of `medalign` with all commands."""
    parser = CommandParser(
        prog="medalign",
        description="Distill what a medical CLIP sees into a medical vision-language model, and measure the result.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"medalign {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(subparsers)
    return parser
