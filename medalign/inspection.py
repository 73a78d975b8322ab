"""What a run will read: the keys of its global batches, or one decoded batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from medalign import pipeline
from medalign.config import Config
from medalign.data.batches.indices import rank_indices_and_prefetch
from medalign.data.order.order import Order, StepPlan
from medalign.data.shards.index import ShardIndex
from medalign.evaluation.report.batches import BatchView, view_batch
from medalign.teacher.loading import read_preprocess_cfg, require_attention
from medalign.training.schedule import describe_length, resolve_steps

log = logging.getLogger("medalign")


def list_keys(config: Config, steps: range, world_size: int, workers: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the step and the sample keys of each global batch of a run, and log how long the run is.

    No image is decoded.

    Args:
        config: the whole configuration.
        steps: the steps to list.
        world_size: number of ranks to simulate.
        workers: number of loader workers per rank to simulate.
    """
    index = pipeline.open_index(config)
    pipeline.require_images(config, index)
    log.info("%s", describe_length(resolve_steps(config, len(index)), len(index)))
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world_size)
    return global_batches(index, pipeline.build_order(config, index), plan, workers, steps)


def global_batches(
    index: ShardIndex, order: Order, plan: StepPlan, workers: int, steps: range
) -> Iterator[tuple[int, list[str]]]:
    """Yield the step and the sample keys of each global batch, joined from what the loader of every rank draws."""
    ranks = [rank_indices_and_prefetch(order, plan, rank, steps.start, workers) for rank in range(plan.world)]
    for step in steps:
        draws = [draw for rank in ranks for draw in islice(rank, plan.accumulation)]
        yield step, [index.key(i) for draw in draws for i in draw.indices]


def view_global_batch(config: Config, step: int) -> BatchView:
    """Read and collate the global batch of a step as in training. No weights are read."""
    index = pipeline.open_index(config)
    pipeline.require_images(config, index)
    require_attention(config)
    views = [read_preprocess_cfg(each.path, each.mean, each.std) for each in config.teachers]
    teacher, also = (views[0] if views else None), views[1:]
    collator, processor = pipeline.check_collator(config, teacher, index.max_images, also)
    batches = next(iter(pipeline.build_loader(config, index, collator, step, whole_batch=True)))
    length = describe_length(resolve_steps(config, len(index)), len(index))
    title = f"step {step} in a run of {length}"
    tokenizer = getattr(processor, "tokenizer", processor)
    return view_batch(batches, tokenizer, collator.student_view, teacher, title, config.data.max_length)
