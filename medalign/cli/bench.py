"""`medalign bench`: correctness, time and memory of the fused kernels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command
from medalign.cli.values import count


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        "measure the fused kernels, or compile them for GPUs that are not present",
        "Without --compile and --tune: correctness, time (median, 20th and 80th percentile) and peak memory of every\n"
        "path at several sizes, value and gradient together. On the CPU, TRITON_INTERPRET=1 includes the fused\n"
        "kernels. They are interpreted, which checks their results but is very slow.\n\n"
        "example: medalign bench kernels --device cuda --output kernels.json",
    )
    parser.add_argument("what", choices=["kernels"], help="what to measure")
    parser.add_argument("--kernel", metavar="NAME", help="only this operation (token_similarity, attention_map)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile every configuration; print registers, spills, shared memory, operations and bytes",
    )
    cards = ["sm_80", "sm_90", "sm_100"]
    parser.add_argument(
        "--architecture", nargs="+", default=cards, metavar="SM", help="with --compile: GPUs (default: all)"
    )
    parser.add_argument("--tune", action="store_true", help="time all candidates and write the table of configurations")
    parser.add_argument(
        "--tables", type=Path, metavar="DIR", help="with --tune: write the tables here instead of into the package"
    )
    parser.add_argument("--seconds", type=count, metavar="S", help="with --tune: time limit per entry of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default %(default)s)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--tokens", nargs="+", type=count, metavar="N", help="sizes (default: 576 to 16384 on cuda)")
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="timed runs (default %(default)s)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PATH", help="paths to leave out, e.g. torch.compile")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the figures to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables.

    Returns:
        The exit status.

    Raises:
        KernelError: a kernel's result is wrong, or a compiled kernel is unusable.
    """
    from medalign.benchmark.kernels import commands

    kernel, device, repeats = arguments.kernel, arguments.device, arguments.repeats
    if arguments.compile:
        tables = commands.compilation(kernel, arguments.architecture)
    elif arguments.tune:
        tables = commands.tuning(kernel, device, repeats, arguments.tables, arguments.seconds)
    else:
        measured = arguments.dtype, arguments.tokens, max(2, repeats), arguments.skip
        tables = commands.measurement(kernel, device, *measured)
    sys.stdout.write(commands.format_tables(tables, arguments.output))
    commands.raise_on_failed_checks(tables)
    return 0
