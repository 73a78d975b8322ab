"""What a step adds to the state of a run, and what a row of metrics shows of it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from medalign import distributed
from medalign.checkpoint.state import WINDOW, TrainState
from medalign.config import Config, TrainConfig
from medalign.contracts import Batch
from medalign.data.batches.reader import check_skip_rate
from medalign.errors import DivergedError
from medalign.observability.meters import memory_gib

log = logging.getLogger("medalign")


def loss_limit(state: TrainState, ratio: float | None) -> float:
    """Return the largest total loss with which the next step may update, given those of the last steps."""
    if ratio is None or len(state.losses) < WINDOW:
        return math.inf
    return ratio * median(state.losses)


def count_if_diverged(
    state: TrainState, losses: Mapping[str, float], done: int, micro_batches: Sequence[Batch], config: TrainConfig
) -> TrainState:
    """Count a step whose loss explodes or whose gradient is not finite. Its update is left out, on all ranks.

    Args:
        state: the state before the step.
        losses: the step's losses and the gradient's norm, the same on all ranks.
        done: number of the step.
        micro_batches: this rank's samples, which the message lists.
        config: the limits.

    Returns:
        The state with the step counted or, if it is a good one, with its loss.

    Raises:
        DivergedError: the limit is passed, or a loss is not finite although the gradient is; on all ranks.
    """
    found = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    total, most = losses["loss/total"], loss_limit(state, config.max_loss_ratio)
    if total > most:
        found = [f"loss/total is {total:.4g}, and at most {most:.4g} follows from the last {WINDOW} steps"]
    if not found:
        return replace(state, losses=(*state.losses, total)[-WINDOW:]) if config.max_loss_ratio else state
    spike = (state.spike_start(done), done)
    state, limit = replace(state, diverged=state.diverged + 1, spike=spike), config.max_diverged_steps
    keys = ", ".join(key for batch in micro_batches for key in batch.keys)
    if math.isfinite(losses["optim/grad_norm"]) or state.diverged > limit:
        raise DivergedError(
            f"step {done}: {', '.join(found)}; the last checkpoint is from before it, and {state.diverged - 1} steps "
            "were left out until then (train.max_diverged_steps). Lower train.lr, train with warm-up or clip more, or "
            f"look at this rank's samples of the step: {keys}"
        )
    left_out = f"its update is left out, on all ranks ({state.diverged} of at most {limit})"
    log.warning("step %d: %s; %s. This rank's samples: %s", done, ", ".join(found), left_out, keys)
    return state


def update_state(
    state: TrainState, config: Config, done: int, micro_batches: Sequence[Batch], requests: torch.Tensor
) -> tuple[TrainState, list[float]]:
    """Return the state after step `done`, with the bad and cut samples of all ranks, and the sums of their requests.

    Every rank must call it.

    Raises:
        DataError: the run has skipped more than `data.max_skip_fraction` of its samples; on all ranks.
    """
    reasons = [reason for batch in micro_batches for reason in batch.skipped]
    for reason in reasons:
        log.warning("bad sample replaced: %s", reason)
    counts = requests.new_tensor([len(reasons), sum(batch.truncated for batch in micro_batches)])
    # One reduction per step carries all that the ranks must know of each other.
    sums = distributed.sum_over_ranks({"counts": torch.cat([counts, requests])})["counts"].tolist()
    skipped, truncated, *stops = sums
    state = replace(
        state,
        step=done,
        samples=done * config.train.batch_size,
        skipped=state.skipped + int(skipped),
        truncated=state.truncated + int(truncated),
    )
    # Of all ranks together, so that all stop at the same step and none waits for another.
    check_skip_rate(state.skipped, state.samples, config.data.max_skip_fraction, reasons)
    return state, stops


def learning_rates(groups: Mapping[str, float]) -> dict[str, float]:
    """The learning rates of a row: `optim/lr` is the language model's, `optim/lr_NAME` that of another group."""
    language = ("adapters", "language_model")  # one of them
    return {"optim/lr" if name in language else f"optim/lr_{name}": rate for name, rate in groups.items()}


def state_metrics(state: TrainState, device: torch.device) -> dict[str, float]:
    """Return the metrics of a row that come from the state, and the memory of this rank."""
    return {
        "time/elapsed_seconds": state.seconds,
        "train/samples": state.samples,
        "train/diverged_steps": state.diverged,
        "train/rewinds": state.rewinds,
        "data/skipped_batches": state.skipped_batches,
        "data/skipped": state.skipped,
        "data/truncated": state.truncated,
        **memory_gib(device),
        **job_metrics(),
    }


def job_metrics() -> dict[str, float]:
    """Return the number of ranks and, under SLURM, the number of the job. Both can change where a run resumes."""
    job = os.environ.get("SLURM_JOB_ID", "")
    found: dict[str, float] = {"job/world_size": distributed.world_size()}
    if job.isdecimal():
        found["job/id"] = int(job)
    return found
