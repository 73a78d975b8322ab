"""`medalign export`: the trained student of a run as safetensors."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command, add_run
from medalign.errors import ConfigError

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "export",
        run,
        "write the trained student as safetensors",
        "Writes the adapter, W and their settings, which `medalign generate` loads. With --merge, writes an ordinary\n"
        "model folder for transformers. This needs a student without W (student.steering false), because W acts only\n"
        "on image tokens.\n\n"
        "example: medalign export runs/first --output student",
    )
    add_run(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base model's weights")
    parser.add_argument(
        "--layout",
        choices=("transformers", "authors"),
        default="transformers",
        help="with --merge: of a base model in the layout of LLaVA's authors, write a folder for their code",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the export and log its folder. Returns the exit status."""
    from medalign.checkpoint import export
    from medalign.model_card import write_card

    source = export.find_export(arguments.run)
    if arguments.layout == "authors" and not arguments.merge:
        raise ConfigError("--layout authors has no effect without --merge; add it, or leave --layout out")
    if arguments.merge:
        export.merge(source, arguments.output, arguments.student, authors_layout=arguments.layout == "authors")
    else:
        export.copy(source, arguments.output)
    write_card(source, arguments.output, arguments.merge, arguments.student)
    log.info("%s", arguments.output)
    return 0
