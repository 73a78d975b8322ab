"""What a run will read, seen before it runs: the keys of its global batches, or one batch in full."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from medalign import run
from medalign.cli.values import count, whole
from medalign.config import Config, load, recipes
from medalign.data.batches.collator import PreprocessCfg
from medalign.data.batches.loader import TrainLoader, rank_indices_and_prefetch
from medalign.data.order.order import Order, StepPlan
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError
from medalign.evaluation.report.batches import BatchView, as_html, as_picture, as_text, view_batch
from medalign.observability.files import write_text
from medalign.teacher.source import teacher_eye
from medalign.training.schedule import describe_length, resolve_steps

_LISTING = ("steps", "skip", "world_size", "workers")  # options of --keys alone
_SHOWING = ("step", "output")  # options of a batch that is shown
_PICTURE, _PAGE = (".png",), (".html", ".htm")

log = logging.getLogger("medalign")

_DESCRIPTION = """\
Show what a recipe will train on.

With --keys: one JSON line a step, {"step": ..., "keys": [...]}, the sample keys of the global batch in order. Nothing
is decoded. Each rank's part is drawn by the loader of a training and put together again, so that the lines are the same
for every --world-size and --workers.

Without --keys: one global batch, decoded, as the towers see it: pictures, text with what is learnt in color, spans,
lengths and padding; in the terminal, or in a page or picture. It shows images and texts of the data: keep it where
those may be."""

_EPILOG = """\
Any setting of the recipe can be overridden (--data.train DIR, --train.batch_size 64, ...).

examples:
  medalign inspect phantom --data.train data/train --keys --steps 3
  medalign inspect phantom --data.train data/train --keys --steps 40 --skip 30 --world-size 8 --workers 4
  medalign inspect phantom --data.train data/train --step 5 --output batch.html"""


def command(words: Sequence[str]) -> int:
    """`medalign inspect`. Returns the exit status."""
    parser = _parser()
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return 0
    if not words or words[0].startswith("-"):
        raise ConfigError(f"name a recipe first: medalign inspect RECIPE; packaged are {', '.join(recipes())}")
    chosen, overrides = parser.parse_known_args(words[1:])
    _check_options(chosen)
    config = load(words[0], overrides, models=not chosen.keys)
    if not config.data.folders:
        raise ConfigError("data.train is not set: name shard folders with --data.train DIR")
    if chosen.keys:
        _print_keys(config, chosen)
    else:
        _show(look(config, chosen.step or 0), chosen.output)
    return 0


def _check_options(chosen: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would say nothing beside the others."""
    foreign = _SHOWING if chosen.keys else _LISTING
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(chosen, name) is not None]
    if given and chosen.keys:
        raise ConfigError(
            f"{given[0]} is for a batch that is shown, and --keys lists keys alone; leave one of them out"
        )
    if given:
        raise ConfigError(f"{given[0]} is for a list of keys; add --keys, or leave it out (--step says which batch)")
    if chosen.output and chosen.output.suffix.lower() not in _PICTURE + _PAGE:
        raise ConfigError(f"--output {chosen.output}: name a file that ends in .html or .png")


def global_batches(
    index: ShardIndex, order: Order, plan: StepPlan, workers: int, steps: range
) -> Iterator[tuple[int, list[str]]]:
    """Step and sample keys of each global batch, put together from what every rank's loader draws for its workers."""
    ranks = [rank_indices_and_prefetch(order, plan, rank, steps.start, workers) for rank in range(plan.world)]
    for step in steps:
        draws = [draw for rank in ranks for draw in islice(rank, plan.accumulation)]
        yield step, [index.key(i) for draw in draws for i in draw.indices]


def look(config: Config, step: int) -> BatchView:
    """The global batch of a step, read and collated as in training; no weights are needed."""
    index = run.open_index(config)
    run.require_images(config, index)
    eye = teacher_eye(config.teacher.path) if config.distils else None
    teacher = PreprocessCfg(*eye) if eye else None
    collator, processor = run.check_collator(config, teacher, index.max_images)
    loader = TrainLoader(
        index,
        run.build_order(config, index),
        collator,
        global_batch=config.train.batch_size,
        micro_batch=config.train.micro_batch_size,
        start_step=step,
    )
    batches = next(iter(loader))
    length = describe_length(resolve_steps(config, len(index)), len(index))
    title = f"step {step} in a run of {length}"
    tokenizer = getattr(processor, "tokenizer", processor)
    return view_batch(batches, tokenizer, collator.student_view, teacher, title, config.data.max_length)


def _print_keys(config: Config, chosen: argparse.Namespace) -> None:
    skip, steps = chosen.skip or 0, 1 if chosen.steps is None else chosen.steps
    if skip >= steps:
        raise ConfigError(
            f"--skip {skip} leaves none of the {steps} steps; the lines are those of the steps from --skip up to "
            "--steps: raise --steps"
        )
    index = run.open_index(config)
    run.require_images(config, index)
    log.info("%s", describe_length(resolve_steps(config, len(index)), len(index)))
    world = chosen.world_size or 1
    workers = config.data.workers if chosen.workers is None else chosen.workers
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    order = run.build_order(config, index)
    for step, keys in global_batches(index, order, plan, workers, range(skip, steps)):
        sys.stdout.write(json.dumps({"step": step, "keys": keys}, ensure_ascii=False) + "\n")


def _show(view: BatchView, output: Path | None) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medalign inspect",
        usage="medalign inspect RECIPE [options] [--section.key VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--keys", action="store_true", help="list the keys of global batches, decode nothing")
    parser.add_argument("--steps", type=whole, metavar="N", help="with --keys: up to step N (default 1)")
    parser.add_argument("--skip", type=whole, metavar="S", help="with --keys: from step S on (default 0)")
    parser.add_argument("--world-size", type=count, metavar="W", help="with --keys: ranks to compute (default 1)")
    parser.add_argument("--workers", type=whole, metavar="K", help="with --keys: loader workers of each rank")
    parser.add_argument("--step", type=whole, metavar="S", help="without --keys: the step (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="without --keys: a .html page or a .png picture")
    return parser
