"""What a run will read, seen before it runs: the keys of its global batches, or one batch in full."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from medalign import run
from medalign.config import Config, load, recipes
from medalign.data.collate import TowerView
from medalign.data.index import ShardIndex
from medalign.data.loader import TrainLoader, rank_numbers
from medalign.data.plan import Order, StepPlan
from medalign.errors import ConfigError
from medalign.evaluation.batches import BatchView, as_html, as_picture, as_text, view_batch
from medalign.observability.files import write_text
from medalign.student import loading
from medalign.teacher.clip import teacher_eye

_AHEAD = 2  # micro-batches that a worker reads before they are asked for, as the DataLoader has it

_DESCRIPTION = """\
Show what a recipe will train on.

With --keys: one JSON line a step, {"step": ..., "keys": [...]}, the sample keys of the global batch in order. Nothing
is decoded. Each rank's and each worker's part is computed by itself and put together again, so that the lines are the
same for every --world-size and --workers.

Without --keys: one global batch, decoded, as the towers see it: pictures, text with what is learnt in colour, spans,
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
    config = load(words[0], overrides, models=not chosen.keys)
    if not config.data.folders:
        raise ConfigError("data.train is not set: name shard folders with --data.train DIR")
    if chosen.keys:
        _print_keys(config, chosen)
    else:
        _show(look(config, chosen.step), chosen.output)
    return 0


def global_batches(
    index: ShardIndex, order: Order, plan: StepPlan, workers: int, steps: range
) -> Iterator[tuple[int, list[str]]]:
    """Step and sample keys of each global batch, put together from what the workers of every rank would read."""
    ranks = [_Rank(index, order, plan, rank, steps.start, workers) for rank in range(plan.world)]
    for step in steps:
        yield step, [key for rank in ranks for key in rank.step()]


class _Rank:
    """One rank of a training: its micro-batches are dealt to its workers in turn, and collected in turn."""

    def __init__(self, index: ShardIndex, order: Order, plan: StepPlan, rank: int, start: int, workers: int) -> None:
        self._index = index
        self._draws = rank_numbers(order, plan, rank, start)
        self._micro_batches = plan.accumulation
        self._workers: list[deque[list[str]]] = [deque() for _ in range(max(workers, 1))]
        self._dealt = self._collected = 0

    def step(self) -> Iterator[str]:
        for _ in range(self._micro_batches):
            while self._dealt < self._collected + _AHEAD * len(self._workers):
                read = [self._index.key(number) for number in next(self._draws)]
                self._workers[self._dealt % len(self._workers)].append(read)
                self._dealt += 1
            yield from self._workers[self._collected % len(self._workers)].popleft()
            self._collected += 1


def look(config: Config, step: int) -> BatchView:
    """The global batch of a step, read and collated as in training; no weights are needed."""
    index = run.open_index(config)
    processor = loading.load_processor(config.student)
    eye = teacher_eye(config.teacher.path) if config.distils else None
    teacher = TowerView(*eye) if eye else None
    anatomy = loading.load_anatomy(config.student)
    collator = run.collator_of(config, anatomy, processor, teacher, index.most_images)
    loader = TrainLoader(
        index,
        run.build_order(config, index),
        collator,
        global_batch=config.train.batch_size,
        micro_batch=config.train.micro_batch_size,
        start_step=step,
    )
    batches = next(iter(loader))
    title = f"step {step}: a global batch of {config.train.batch_size} from {len(index)} samples"
    tokenizer = getattr(processor, "tokenizer", processor)
    return view_batch(batches, tokenizer, collator.student_view, teacher, title)


def _print_keys(config: Config, chosen: argparse.Namespace) -> None:
    if chosen.skip >= chosen.steps:
        raise ConfigError(
            f"--skip {chosen.skip} leaves none of the {chosen.steps} steps; the lines are those of the steps from "
            "--skip up to --steps: raise --steps"
        )
    index = run.open_index(config)
    world = chosen.world_size or 1
    workers = config.data.workers if chosen.workers is None else chosen.workers
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    order = run.build_order(config, index)
    for step, keys in global_batches(index, order, plan, workers, range(chosen.skip, chosen.steps)):
        sys.stdout.write(json.dumps({"step": step, "keys": keys}, ensure_ascii=False) + "\n")


def _show(view: BatchView, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(as_text(view, colour=_wants_colour()))
    elif output.suffix.lower() == ".png":
        as_picture(view).save(output)
    elif output.suffix.lower() in (".html", ".htm"):
        write_text(output, as_html(view))
    else:
        raise ConfigError(f"--output {output}: name a file that ends in .html or .png")


def _wants_colour() -> bool:
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
    parser.add_argument("--steps", type=_whole, default=1, metavar="N", help="with --keys: up to step N (default 1)")
    parser.add_argument("--skip", type=_whole, default=0, metavar="S", help="with --keys: from step S on (default 0)")
    parser.add_argument("--world-size", type=_whole, metavar="W", help="with --keys: ranks to compute (default 1)")
    parser.add_argument("--workers", type=_whole, metavar="K", help="with --keys: loader workers of each rank")
    parser.add_argument("--step", type=_whole, default=0, metavar="S", help="without --keys: the step (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="without --keys: a .html page or a .png picture")
    return parser


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value
