"""The options of `medalign generate` and `medalign evaluate` that say how answers are decoded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medalign.cli.values import count, positive, share, whole

if TYPE_CHECKING:
    from medalign.student.decoding import Decoding


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add --max-new-tokens and the options of beam search and sampling."""
    group = parser.add_argument_group("decoding", "greedy by default")
    group.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="maximum tokens of an answer (default 128)"
    )
    group.add_argument("--num-beams", type=count, default=1, metavar="N", help="beam search with N beams")
    group.add_argument("--do-sample", action="store_true", help="sample from the nucleus")
    group.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="probability of the nucleus, with --do-sample (default 1)"
    )
    group.add_argument(
        "--temperature",
        type=positive,
        default=1.0,
        metavar="T",
        help="divides the logits, with --do-sample (default 1)",
    )
    group.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="of --do-sample (default 0); an answer depends on the seed and its sample, not on the batch or the ranks",
    )


def read_decoding(arguments: argparse.Namespace) -> Decoding:
    """Return the settings of these options.

    Raises:
        ConfigError: two options exclude each other, or one has no effect.
    """
    from medalign.student.decoding import Decoding

    return Decoding(
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        do_sample=arguments.do_sample,
        top_p=arguments.top_p,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
