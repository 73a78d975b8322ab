"""Operations of a step, and bytes on the wire. A multiply-add counts as two operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from medalign.engine.engine import stage
from medalign.planning.shapes import TeacherShape, parameters, vision_tokens
from medalign.student.model import Student

_FLOAT32 = 4


@dataclass(frozen=True)
class Operations:
    """Operations per sample, by part. L tokens, K supervised, N image tokens, D width, w width of all heads.

    Attributes:
        blocks: 2 per weight and token forward, 2 for the gradient of the input, and 2 for that of the weights if they
            are trained. Attention: 2 L^2 w forward (the causal half of two products) and twice that backward.
            With checkpointing, another forward pass of all blocks except one.
        head: 4 K V D: forward and gradient of the input; 6 K V D if it is trained.
        vision: the towers of student and teachers, forward: 2 per weight and token, and 4 M^2 width per block for the
            attention of M tokens; three times that for a trained tower; and the projector.
        distillation: W and the two losses, per tapped block: 6 N D^2, 6 N^2 (D + E) for each teacher, and 6 L^2 w;
            12 N D r for a W of rank r.
    """

    blocks: float
    head: float
    vision: float
    distillation: float

    @property
    def total(self) -> float:
        """Operations per sample."""
        return self.blocks + self.head + self.vision + self.distillation


def operations(
    student: Student, teachers: Sequence[TeacherShape], length: int, supervised: int, checkpointing: bool
) -> Operations:
    """Count the operations per sample; the formulas are those of `Operations`.

    Args:
        student: on the meta device.
        teachers: the teachers on the meta device.
        length: L, tokens of a sample.
        supervised: K, supervised tokens of a sample.
        checkpointing: whether blocks are recomputed.
    """
    spec = student.spec
    language: Any = spec.language_model.config
    count: Any = getattr(language, "num_attention_heads", 0)
    heads = (getattr(language, "head_dim", None) or language.hidden_size // count) * count
    forward = sum(_forward(block) * length + 2 * length**2 * heads for block in spec.blocks)
    trained = sum(2 * p.numel() * length for block in spec.blocks for p in block.parameters() if p.requires_grad)
    linear = sum(_forward(block) * length for block in spec.blocks)
    backward = linear + 2 * (forward - linear) + trained
    again = forward * (len(spec.blocks) - 1) / len(spec.blocks) if checkpointing else 0.0
    vocabulary = spec.model.get_input_embeddings().weight.shape[0]
    tokens, (patches, width) = spec.image.count, vision_tokens(student)
    projector = _forward(spec.projector) * tokens + (4 * parameters(spec.projector, trainable=True) * tokens)
    learned = student.trainable()
    vision = _tower(spec.vision_tower, patches, width) * (3 if "vision_tower" in learned else 1) + projector
    distillation = 6.0 * length**2 * heads if teachers else 0.0
    for tower, runs in teachers:
        distillation += 6 * tokens**2 * (spec.width + tower.width)
        vision += _tower(tower, tower.grid.size + 1, tower.width) if runs else 0.0
    distillation *= len(student.layers)
    distillation += 6 * tokens * sum(p.numel() for _, p in learned.get("steering", ()))
    head = (6 if "language_model" in learned else 4) * supervised * vocabulary * spec.width
    return Operations(forward + backward + again, head, vision, distillation)


def _forward(module: nn.Module) -> float:
    """Operations per token of the linear layers, forward."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _tower(tower: nn.Module, tokens: int, width: int) -> float:
    """Operations of a frozen tower for one image; 12 width^2 weights per block are a transformer's."""
    weights = sum(p.numel() for p in tower.parameters() if p.ndim == 2)
    blocks = max(1, round(weights / (12 * width**2)))
    return 2.0 * weights * tokens + 4.0 * tokens**2 * width * blocks


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU receives per step, with N ranks and a micro-batches per step and rank.

    Attributes:
        gather: ZeRO-3: (N - 1) / N of the sharded weights, per micro-batch: once forward and once backward for the
            language model and its head (blocks once more with checkpointing), once for what is frozen and before it;
            and of the weights too small to be sharded, once per step, all of them. ZeRO-2: (N - 1) / N of the updated
            trainable weights, once per step.
        reduce: (N - 1) / N of the float32 gradients per micro-batch; without sharding twice that (all-reduce), once.
    """

    gather: float
    reduce: float

    @property
    def total(self) -> float:
        """Bytes per step and GPU."""
        return self.gather + self.reduce


def traffic(
    student: Student, settings: Mapping[str, Any], world: int, accumulation: int, width: int, checkpointing: bool
) -> Traffic:
    """Return the bytes on the wire; the formulas are those of `Traffic`.

    Args:
        student: on the meta device.
        settings: the complete DeepSpeed configuration.
        world: N, number of ranks.
        accumulation: a, micro-batches per step and rank.
        width: bytes per weight.
        checkpointing: whether blocks are recomputed.
    """
    level, part = stage(settings), (world - 1) / world
    trained = parameters(student, trainable=True)
    if level < 2:
        return Traffic(part * trained * width * (level == 1), part * trained * _FLOAT32 * (1 if level else 2))
    reduce = part * trained * _FLOAT32 * accumulation
    if level == 2:
        return Traffic(part * trained * width, reduce)
    threshold = int(settings.get("zero_optimization", {}).get("stage3_param_persistence_threshold", 100_000))
    inside = {id(p) for block in student.spec.blocks for p in block.parameters()}
    head = {id(p) for p in student.spec.model.get_output_embeddings().parameters()}
    times = 3 if checkpointing else 2
    gathered, whole = 0, 0
    for p in student.parameters():
        if p.numel() < threshold:
            whole += p.numel()
        else:
            gathered += p.numel() * (times if id(p) in inside else 2 if p.requires_grad or id(p) in head else 1)
    return Traffic(part * width * (gathered * accumulation + whole), reduce)
