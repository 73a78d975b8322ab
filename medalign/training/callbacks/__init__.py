"""What happens during a run beside the steps, one callback per file."""

from medalign.training.callbacks.checkpointing import Checkpointing
from medalign.training.callbacks.console import ConsoleLogger
from medalign.training.callbacks.data_progress import DataProgress
from medalign.training.callbacks.efficiency import Efficiency
from medalign.training.callbacks.heartbeat import Heartbeat
from medalign.training.callbacks.metrics import MetricLogger
from medalign.training.callbacks.preemption import StopOnSignal
from medalign.training.callbacks.profiler import Profiler
from medalign.training.callbacks.steering_norm import SteeringNorm
from medalign.training.callbacks.validation import Validation
from medalign.training.callbacks.wandb_logger import WandbLogger
from medalign.training.trainer import Callback

__all__ = [
    "Callback",
    "Checkpointing",
    "ConsoleLogger",
    "DataProgress",
    "Efficiency",
    "Heartbeat",
    "MetricLogger",
    "Profiler",
    "SteeringNorm",
    "StopOnSignal",
    "Validation",
    "WandbLogger",
]
