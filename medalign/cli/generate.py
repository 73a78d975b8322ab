"""`medalign generate`: the answer to one question about images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medalign.cli.decoding import add_decoding, read_decoding
from medalign.cli.parser import Subparsers, add_command, add_max_length, add_run


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "generate",
        run,
        "answer a question about one or more images",
        "Prints the answer. With --overlay, draws the attention of the question's tokens at the tapped block on the\n"
        "first image.\n\n"
        'example: medalign generate runs/first --image film.png --question "Is there an effusion?" --overlay map.png',
    )
    add_run(parser)
    add_max_length(parser)
    add_decoding(parser)
    parser.add_argument(
        "--image",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or DICOM; repeat the option for further images, in order",
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="picture to write (.png or .jpg)")


def run(arguments: argparse.Namespace) -> int:
    """Print the answer. Returns the exit status."""
    from medalign.inference import generate

    answer = generate(
        arguments.run,
        arguments.image,
        arguments.question,
        arguments.overlay,
        decoding=read_decoding(arguments),
        max_length=arguments.max_length,
        base=arguments.student,
    )
    sys.stdout.write(answer.text + "\n")
    return 0
