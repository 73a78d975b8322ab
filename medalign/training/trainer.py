"""The schedule of a run and nothing else: when to step, to write a row, to write a checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from medalign import distributed
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import Batch
from medalign.data.batches.loader import check_skip_rate
from medalign.errors import DivergedError, MedAlignError
from medalign.observability.meters import Throughput, peak_memory_gib
from medalign.observability.sinks import ConsoleSink, Sink
from medalign.training.schedule import rates, total_steps
from medalign.training.step import TrainStep

log = logging.getLogger("medalign")


def train(
    config: Config,
    step: TrainStep,
    batches: Iterator[list[Batch]],
    progress: TrainState,
    sinks: Sequence[Sink],
    save: Callable[[TrainState], None],
) -> TrainState:
    """Run from `progress.step` to the last step. `save` is called on every rank.

    Args:
        batches: for each step from `progress.step` on, this rank's micro-batches.
        sinks: where rows go; empty on ranks other than 0.
    """
    total, device = total_steps(config.train), step.engine.device
    speed, row = Throughput(device), {}
    started = time.perf_counter() - progress.seconds
    for number in range(progress.step, total):
        distributed.seed_step(config.run.seed, number)
        with speed.waiting():
            micro_batches, fault = _next_batch_or_error(batches)
        now = rates(number, config)
        losses = step(micro_batches, now, fault)
        _check_finite(losses, number + 1, micro_batches)
        done = number + 1
        progress = _update_state(progress, config, done, micro_batches, device)
        progress = replace(progress, seconds=time.perf_counter() - started)
        speed.add(sum(len(b.keys) for b in micro_batches), sum(int(b.attention_mask.sum()) for b in micro_batches))
        if done % config.log.interval == 0 or done == total:
            row = losses | _rates(step.engine.rates()) | speed.reduce() | _state(progress, device)
            for sink in sinks:
                sink.log(done, row)
        _update_progress_bar(sinks, done)
        if done % config.checkpoint.interval == 0 or done == total:
            began = time.perf_counter()
            save(progress)
            log.info("step %d: checkpoint written in %.1f s", done, time.perf_counter() - began)
    return progress


def _next_batch_or_error(batches: Iterator[list[Batch]]) -> tuple[list[Batch], MedAlignError | None]:
    """This rank's micro-batches, or why there are none: the step tells the other ranks, which would wait for it."""
    try:
        return next(batches), None
    except MedAlignError as error:
        return [], error


def _check_finite(losses: Mapping[str, float], done: int, micro_batches: Sequence[Batch]) -> None:
    """Stop on all ranks at the first step that is not a number; its weights are never written to a checkpoint."""
    lost = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if lost:
        keys = ", ".join(key for batch in micro_batches for key in batch.keys)
        raise DivergedError(
            f"step {done}: {', '.join(lost)}; the last checkpoint is from before it. Lower train.lr, train with "
            f"warm-up or clip more, or look at this rank's samples of the step: {keys}"
        )


def _update_state(
    progress: TrainState, config: Config, done: int, micro_batches: Sequence[Batch], device: object
) -> TrainState:
    reasons = [reason for batch in micro_batches for reason in batch.skipped]
    for reason in reasons:
        log.warning("bad sample replaced: %s", reason)
    bad = torch.tensor([len(reasons), sum(b.truncated for b in micro_batches)])
    skipped, truncated = distributed.sum_over_ranks({"bad": bad.to(str(device))})["bad"].tolist()
    progress = replace(
        progress,
        step=done,
        samples=done * config.train.batch_size,
        skipped=progress.skipped + int(skipped),
        truncated=progress.truncated + int(truncated),
    )
    # Of all ranks together, so that all stop at the same step and none waits for another.
    check_skip_rate(progress.skipped, progress.samples, config.data.max_skip_fraction, reasons)
    return progress


def _rates(groups: Mapping[str, float]) -> dict[str, float]:
    """The learning rates of a row: `optim/lr` is that of LoRA, `optim/lr_NAME` that of another parameter group."""
    return {"optim/lr" if name == "adapters" else f"optim/lr_{name}": rate for name, rate in groups.items()}


def _state(progress: TrainState, device: object) -> dict[str, float]:
    return {
        "time/elapsed_seconds": progress.seconds,
        "data/skipped": progress.skipped,
        "data/truncated": progress.truncated,
        "memory/peak_gib": peak_memory_gib(str(device)),
    }


def _update_progress_bar(sinks: Sequence[Sink], done: int) -> None:
    for sink in sinks:
        if isinstance(sink, ConsoleSink):
            sink.tick(done)
