"""The run as a whole: its folder, checkpoints, ranks and log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medalign.config.value_types import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed

WandbMode = Literal["off", "offline", "online"]


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints, export. If it contains a run, the run is resumed."""
    seed: Seed = 0
    """Determines the data order, the initial LoRA weights and every dropout mask. From 0 to 2^32 - 1."""


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    interval: PositiveInt = 500
    """Steps between two checkpoints; the last step always writes one."""
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    keep_interval: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0 is none. It is a multiple of
    checkpoint.interval."""
    asynchronous: bool = True
    """Whether the run continues while a checkpoint is written. It waits only until each rank has copied its state into
    host memory: 12 bytes per trainable parameter, divided by the number of ranks, and up to 4 more on rank 0. The
    checkpoint of the last step, or of a request to stop, is always waited for."""
    retry_minutes: NonNegativeFloat = 10.0
    """How long the checkpoint of the last step is tried again if it cannot be written, such as on a full disk. An
    earlier one is tried again when the next one is due, and the run continues."""


@dataclass
class EngineConfig:
    """How the state is distributed over the ranks."""

    deepspeed: str = "zero3"
    """Name of a DeepSpeed configuration in ds_configs/, or a path to one."""
    start_timeout: NonNegativeFloat = 300.0
    """Seconds after which a run is considered to hang: in a part of its start, its first step, a checkpoint or a batch
    of a validation. The stacks of all ranks are then written into the run's folder, and the run ends; 0 is never."""
    step_timeout: NonNegativeFloat = 100.0
    """The same for reading the batch of a step, and for each of its micro-batches."""


@dataclass
class LogConfig:
    """What is logged during the run: numbers, and settings without paths; no image or text of the data."""

    interval: PositiveInt = 10
    """Steps between two rows of metrics."""
    wandb: WandbMode = "offline"
    """Weights & Biases: off, kept in the run's folder, or sent."""
    project: str = "medalign"
    """W&B project."""
    entity: str | None = None
    """W&B team."""
    name: str | None = None
    """Name of the run in W&B. By default its random id, because a folder's name may identify patients."""
    group: str | None = None
    """Group of the run in W&B, such as one for all seeds of an arm."""
    job_type: str | None = None
    """Kind of the run in W&B, such as pilot."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B."""
    notes: str | None = None
    """Notes on the run in W&B."""
    system_metrics: bool = False
    """Whether W&B also measures the CPUs, GPUs, disk and network of rank 0's node."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch.profiler traces into profile/ in the run's folder, after the first three; 0 is off."""
