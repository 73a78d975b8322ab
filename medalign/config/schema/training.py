"""The optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medalign.config.value_types import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFiniteFloat,
    PositiveFloat,
    PositiveInt,
    Precision,
)

LearningRateSchedule = Literal["cosine", "linear", "constant"]


@dataclass
class TrainConfig:
    """The optimization."""

    steps: NonNegativeInt | None = 1000
    """Optimizer steps of the whole run; 0 writes the untrained student as a run. null if train.epochs is set."""
    epochs: PositiveFiniteFloat | None = None
    """Passes over the training samples, instead of train.steps: epochs * samples / batch_size steps, rounded to the
    nearest whole number (halves up), at least 1. If the command line sets one of the two, the recipe's other one is
    ignored."""
    batch_size: PositiveInt = 32
    """Samples per step, over all ranks and accumulated micro-batches."""
    micro_batch_size: PositiveInt = 4
    """Samples per forward pass of one rank."""
    lr: NonNegativeFloat = 2e-4
    """Peak learning rate of the adapters, W and the mixture, and of the language model with student.train full, which
    needs a smaller one, such as 2e-5."""
    projector_lr: NonNegativeFloat = 2e-5
    """Peak learning rate of the projector."""
    vision_tower_lr: NonNegativeFloat = 2e-6
    """Peak learning rate of the vision tower."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of trained matrices. W has none, nor have biases, the weights of norms, and DoRA's norms."""
    warmup_ratio: ClosedUnitInterval | None = 0.03
    """Share of the steps over which the learning rate rises linearly to its peak. null if train.warmup_steps is set."""
    warmup_steps: NonNegativeInt | None = None
    """Steps over which the learning rate rises, instead of train.warmup_ratio. If the command line sets one of the two,
    the recipe's other one is ignored."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 disables clipping."""
    max_diverged_steps: NonNegativeInt = 5
    """Steps of the run whose loss or gradient may be NaN or infinite. Such a step updates nothing, on all ranks, and
    its samples are logged; one more than these ends the run."""
    max_loss_ratio: PositiveFloat | None = None
    """A step is treated in the same way if its total loss is more than this many times the median of the last 20 steps.
    null is off."""
    rewind_on_spike: NonNegativeInt = 0
    """How many times a run may go back where max_diverged_steps would end it: it loads the last checkpoint before the
    spike, and leaves out the batches up to its end. 0 is off."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    evaluate_every: NonNegativeInt = 0
    """Steps between two evaluations of the losses on data.validation; 0 disables them. The last step is evaluated too.
    Each new lowest loss (best_metric) writes a checkpoint, which is kept until there is a lower one; the file
    checkpoints/best contains its name."""
    best_metric: str = "loss/total"
    """The loss on data.validation that decides which checkpoint is the best: loss/total, or loss/NAME of a term."""


@dataclass
class OptimizerConfig:
    """AdamW, and the schedule of its learning rates after the warm-up. The peaks are settings of train."""

    betas: tuple[HalfOpenUnitInterval, HalfOpenUnitInterval] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's term in the denominator."""
    schedule: LearningRateSchedule = "cosine"
    """The learning rate after the warm-up. cosine: falls to the minimum along half a cosine. linear: falls to the
    minimum linearly. constant: stays at the peak."""
    min_lr_ratio: ClosedUnitInterval = 0.0
    """Minimum of each learning rate as a share of its peak. It has no effect on a constant schedule."""
