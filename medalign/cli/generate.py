"""`medalign generate`: the answer to one question about images, or to the questions of a file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from medalign.cli.decoding import add_decoding, read_decodings
from medalign.cli.parser import Subparsers, add_command, add_max_length, add_max_skip_fraction, add_run
from medalign.cli.ranks import status_on_all_ranks
from medalign.cli.values import count
from medalign.errors import ConfigError

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "generate",
        run,
        "answer a question about one or more images, or the questions of a file",
        "With --question, prints the answer; with --overlay, draws the attention of the question's tokens at the\n"
        "tapped block on the first image. With --input, answers a JSONL file of questions in batches, on any number\n"
        "of ranks (deepspeed --module medalign generate ...); an interrupted call continues. A line of the file has\n"
        '"id", "image" (a path relative to the file, a list, or null) and "question", and may have the other fields\n'
        "of `medalign shards jsonl`.\n\n"
        'example: medalign generate runs/first --image film.png --question "Is there an effusion?" --overlay map.png\n'
        "         medalign generate runs/first --input questions.jsonl --output answers.jsonl",
    )
    add_run(parser)
    add_max_length(parser)
    add_decoding(parser, several=False)
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        help="PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or DICOM; repeat the option for further images, in order",
    )
    parser.add_argument("--question", metavar="TEXT", help="the question")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="picture to write (.png or .jpg)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="JSONL file of questions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new JSONL file of answers, with --input")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="with --input; default %(default)s")
    add_max_skip_fraction(parser, 0.0)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer, or write the file of answers. Returns the exit status."""
    one = {"--image": arguments.image, "--question": arguments.question, "--overlay": arguments.overlay}
    several = {"--input": arguments.input, "--output": arguments.output}
    require_one_group(one, several, optional=("--overlay",))
    return _answer_one(arguments) if arguments.input is None else _answer_file(arguments)


def require_one_group(one: dict[str, object], other: dict[str, object], optional: Sequence[str]) -> None:
    """Raise ConfigError unless all options of one group are given, and none of the other.

    Args:
        one: options with their values; None if an option is not given.
        other: the other group.
        optional: options that may be missing.
    """
    given, absent = (one, other) if any(value is not None for value in one.values()) else (other, one)
    if extra := [name for name, value in absent.items() if value is not None]:
        first = next(name for name, value in given.items() if value is not None)
        raise ConfigError(f"{first} and {extra[0]} exclude each other; give {', '.join(one)}, or {', '.join(other)}")
    for name, value in given.items():
        if value is None and name not in optional:
            raise ConfigError(f"{name} is missing; give {', '.join(one)}, or {', '.join(other)}")


def _answer_one(arguments: argparse.Namespace) -> int:
    from medalign import distributed
    from medalign.inference import generate

    if distributed.world_size() > 1:
        raise ConfigError("one question is answered in one process, not on several ranks; start it without a launcher")
    answer = generate(
        arguments.run,
        arguments.image,
        arguments.question,
        arguments.overlay,
        decoding=read_decodings(arguments)[0],
        max_length=arguments.max_length,
        base=arguments.student,
    )
    sys.stdout.write(answer.text + "\n")
    return 0


def _answer_file(arguments: argparse.Namespace) -> int:
    from medalign.questions import generate_file

    with status_on_all_ranks():
        output = generate_file(
            arguments.run,
            arguments.input,
            arguments.output,
            batch_size=arguments.batch_size,
            decoding=read_decodings(arguments)[0],
            max_length=arguments.max_length,
            max_skip_fraction=arguments.max_skip_fraction,
            base=arguments.student,
        )
    log.info("answers: %s", output)
    return 0
