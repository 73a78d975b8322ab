"""A plan: what a run needs on a number of GPUs, and how long it takes at a stated efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from medalign.config import Config
from medalign.data.order.order import StepPlan
from medalign.engine.engine import stage
from medalign.engine.settings import deepspeed_settings
from medalign.errors import ConfigError
from medalign.planning.cards import CARDS, Card
from medalign.planning.memory import PerSample, State, largest_micro_batch, per_sample, state
from medalign.planning.shapes import TeacherShape, parameters, saved_bytes, student_on_meta, teachers_on_meta
from medalign.planning.work import Operations, Traffic, operations, traffic
from medalign.student.model import Student


@dataclass(frozen=True)
class Conditions:
    """What a plan assumes.

    Attributes:
        nodes: number of nodes.
        gpus: GPUs per node.
        efficiency: share of the peak operations per second that the GPUs reach.
        network: bytes per second that a node receives per GPU.
        length: tokens of a sample.
        supervised: supervised tokens of a sample.
    """

    nodes: int
    gpus: int
    efficiency: float
    network: float
    length: int
    supervised: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class OnCard:
    """What a plan says about one GPU.

    Attributes:
        micro_batch: largest micro-batch that fits, without and with gradient checkpointing.
        seconds: per step with the settings of the run.
        days: of the whole run; None if its number of steps is not known.
        fits: whether the run's micro-batch fits.
    """

    card: Card
    micro_batch: dict[str, int]
    seconds: float
    days: float | None
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are those of one GPU."""

    conditions: Conditions
    stage: int
    micro_batch: int
    accumulation: int
    steps: int | None
    checkpointing: bool
    parameters: dict[str, int]
    trainable: dict[str, int]
    state: State
    states: dict[str, int]  # the total of each ZeRO stage, without offloading
    sample: dict[str, PerSample]  # without and with gradient checkpointing
    operations: Operations
    traffic: Traffic
    cards: dict[str, OnCard]

    @property
    def memory(self) -> int:
        """Bytes of the run on one GPU."""
        return self.state.total + self.micro_batch * self.sample[_NAMES[self.checkpointing]].total

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return asdict(self) | {
            "memory": self.memory,
            "cards": {name: asdict(card) | {"card": card.card._asdict()} for name, card in self.cards.items()},
        }


_NAMES = {False: "stored", True: "checkpointed"}


def make_plan(
    config: Config,
    *,
    nodes: int,
    gpus: int,
    efficiency: float = 0.4,
    network: float = 50e9,
    length: int | None = None,
    supervised: int | None = None,
    samples: int | None = None,
) -> Plan:
    """Derive a plan from the shapes of the models. Nothing is allocated, and no weight is read.

    The time of a step is the longer of computing and communicating if the DeepSpeed configuration overlaps them
    (overlap_comm), otherwise their sum:

        compute = operations per sample * batch_size / (ranks * peak * efficiency)
        wire    = bytes per GPU / (link on one node, else min(link, gpus * network))

    Args:
        config: the run's settings.
        nodes: number of nodes.
        gpus: GPUs per node.
        efficiency: share of the peak operations per second that the GPUs reach.
        network: bytes per second that a node receives per GPU.
        length: tokens of a sample; data.max_length by default.
        supervised: supervised tokens of a sample; by default all after the image, the most that can be.
        samples: training samples, for the steps of train.epochs.

    Raises:
        ConfigError: a model's folder cannot be used, or a sample has no room for an image.
    """
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    student, teachers = student_on_meta(config.student, dtype), teachers_on_meta(config, dtype)
    conditions = _conditions(config, student, nodes, gpus, efficiency, network, length, supervised)
    width, world = dtype.itemsize, conditions.world
    settings = deepspeed_settings(config, world)
    step = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    recompute = config.student.gradient_checkpointing
    quantized = config.student.quantization != "none"
    levels = (1, 2) if quantized else (1, 2, 3)  # ZeRO-3 cannot partition weights of 4 bits
    held = state(student, teachers, settings, world, width, quantized=quantized)
    each = _per_sample(student, teachers, conditions, width)
    work = operations(student, teachers, conditions.length, conditions.supervised, recompute)
    wire = traffic(student, settings, world, step.accumulation, width, recompute)
    micro_batch = min(config.train.micro_batch_size, -(-config.train.batch_size // world))
    plan = Plan(
        conditions=conditions,
        stage=stage(settings),
        micro_batch=micro_batch,
        accumulation=step.accumulation,
        steps=_steps(config, samples),
        checkpointing=recompute,
        parameters=_parts(student)
        | ({"teacher": sum(parameters(each.tower) for each in teachers)} if teachers else {}),
        trainable={name: sum(p.numel() for _, p in group) for name, group in student.trainable().items()},
        state=held,
        states={
            str(level): _at_stage(student, teachers, settings, level, world, width, quantized).total for level in levels
        },
        sample=each,
        operations=work,
        traffic=wire,
        cards={},
    )
    overlap = bool(settings.get("zero_optimization", {}).get("overlap_comm", False))
    for name, card in CARDS.items():
        plan.cards[name] = _on_card(plan, card, config.train.batch_size, overlap, full=width == 4)
    return plan


def _conditions(
    config: Config,
    student: Student,
    nodes: int,
    gpus: int,
    efficiency: float,
    network: float,
    length: int | None,
    supervised: int | None,
) -> Conditions:
    length = config.data.max_length if length is None else length
    room = length - student.spec.image.count
    if room < 1:
        raise ConfigError(
            f"a sample of {length} tokens has no room for an image of {student.spec.image.count}; raise --length, or "
            "data.max_length"
        )
    return Conditions(nodes, gpus, efficiency, network, length, min(room, supervised or room))


def _steps(config: Config, samples: int | None) -> int | None:
    """Return the steps of the run; None if they are in epochs of an unknown number of samples."""
    if config.train.steps is not None:
        return config.train.steps
    if samples is None or config.train.epochs is None:
        return None
    return max(1, int(config.train.epochs * samples / config.train.batch_size + 0.5))


def _parts(student: Student) -> dict[str, int]:
    """Count the parameters by part of the student; the parts add up to the whole."""
    spec, learned = student.spec, student.trainable()
    vision, projector = parameters(spec.vision_tower), parameters(spec.projector)
    inside = {id(p) for p in spec.projector.parameters()} & {id(p) for p in spec.vision_tower.parameters()}
    if inside:  # a projector that is the end of the tower
        vision -= projector
    beside = ("adapters", "mixture", "steering")
    added = {name: sum(p.numel() for _, p in group) for name, group in learned.items() if name in beside}
    language = parameters(student) - vision - projector - sum(added.values())
    return {"vision tower": vision, "projector": projector, "language model": language, **added}


def _at_stage(
    student: Student,
    teachers: Sequence[TeacherShape],
    settings: dict[str, Any],
    level: int,
    world: int,
    width: int,
    quantized: bool,
) -> State:
    zero = {k: v for k, v in settings.get("zero_optimization", {}).items() if not k.startswith("offload")}
    stage_only = {"zero_optimization": zero | {"stage": level}}
    return state(student, teachers, stage_only, world, width, quantized=quantized)


def _per_sample(
    student: Student, teachers: Sequence[TeacherShape], conditions: Conditions, width: int
) -> dict[str, PerSample]:
    saved = saved_bytes(student, 1, conditions.length)
    return {
        name: per_sample(
            student, teachers, saved.total(recompute, student.layers), conditions.length, conditions.supervised, width
        )
        for recompute, name in _NAMES.items()
    }


def _on_card(plan: Plan, card: Card, batch_size: int, overlap: bool, *, full: bool) -> OnCard:
    """Return what the plan says about a card; `full` means float32."""
    conditions = plan.conditions
    limit = -(-batch_size // conditions.world)
    peak = card.fp32_operations if full else card.operations
    compute = plan.operations.total * batch_size / (conditions.world * peak * conditions.efficiency)
    speed = card.link if conditions.nodes == 1 else min(card.link, conditions.gpus * conditions.network)
    wire = plan.traffic.total / speed
    seconds = max(compute, wire) if overlap else compute + wire
    micro = {
        name: largest_micro_batch(card.memory, plan.state.total, each.total, limit)
        for name, each in plan.sample.items()
    }
    days = None if plan.steps is None else plan.steps * seconds / 86_400
    return OnCard(card, micro, seconds, days, micro[_NAMES[plan.checkpointing]] >= plan.micro_batch)
