"""The callbacks that add to the rows of metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medalign.config import Config
from medalign.data.order.order import Order
from medalign.observability.meters import ModuleTimer
from medalign.planning.cards import find_card
from medalign.student.model import Student
from medalign.teacher.model import TargetSource
from medalign.training.callbacks import Callback, DataProgress, Efficiency, SteeringNorm
from medalign.training.model_flops import model_flops


def build_gauges(
    config: Config,
    order: Order,
    sizes: Sequence[int],
    student: Student,
    teachers: Sequence[TargetSource],
    device: torch.device,
) -> list[Callback]:
    """Build the callbacks that measure a run. Attach them on every rank.

    Args:
        config: the whole configuration.
        order: the order of the training samples.
        sizes: number of samples of each training folder.
        student: the student, possibly partitioned.
        teachers: the teachers of this rank; none when nothing is distilled.
        device: the device of this rank.
    """
    timers = [ModuleTimer(teacher, device) for teacher in teachers]
    gauges: list[Callback] = [
        Efficiency(model_flops(config), _peak(config, device), timers),
        DataProgress(order, sizes),
    ]
    steering = student.trainable().get("steering")
    if steering:
        gauges.append(SteeringNorm([parameter for _, parameter in steering]))
    return gauges


def _peak(config: Config, device: torch.device) -> float | None:
    """Return the operations per second that the device can reach; None if its data sheet is not known."""
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None:
        return None
    return card.fp32_operations if config.train.precision == "fp32" else card.operations
