"""Bytes of GPU memory by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medalign.engine.engine import stage
from medalign.planning.shapes import TeacherShape, parameters, quantized_weights, vision_blocks, vision_tokens
from medalign.student.model import Student
from medalign.student.quantization import stored_bytes

_FLOAT32 = 4
_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters
USABLE = 0.92  # share of a GPU's memory that tensors can have: CUDA's context, NCCL and fragmentation take the rest


@dataclass(frozen=True)
class State:
    """Bytes per GPU that do not depend on the micro-batch.

    With P parameters, T of them trainable, N ranks, and b bytes per weight (ZeRO stage 2 / stage 3):

    Attributes:
        weights: P b / (P b / N, and the whole of each parameter below stage3_param_persistence_threshold beside its
            share). With QLoRA, ZeRO-2: 4 bits and the scales for the linear layers of the blocks, b for the others.
        gathered: 0 / the weights that ZeRO-3 holds whole for the blocks that run, at most
            min(P, stage3_max_live_parameters) b. With QLoRA, ZeRO-2: the largest of those layers once in b bytes per
            weight, to which each is unpacked when it runs.
        gradients: 4 T / N, the sums in float32 over micro-batches.
        optimizer: 12 T / N: AdamW's two moments and the float32 copy of the weights. ZeRO keeps that copy for float32
            weights too.
        buckets: 4 bytes for each element of reduce_bucket_size, at most 4 T.
        teacher: the whole frozen towers on every rank; none of a teacher with a cache.
        offloaded: what is in CPU memory instead, per rank.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    buckets: int
    teacher: int
    offloaded: int

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.buckets + self.teacher


def state(
    student: Student,
    teachers: Sequence[TeacherShape],
    settings: Mapping[str, Any],
    world: int,
    width: int,
    *,
    quantized: bool = False,
) -> State:
    """Return the bytes that do not depend on the micro-batch; the formulas are those of `State`.

    Args:
        student: on the meta device.
        teachers: the teachers on the meta device.
        settings: the complete DeepSpeed configuration.
        world: N, number of ranks.
        width: b, bytes per weight.
        quantized: whether the linear layers of the blocks have 4 bits (student.quantization). Not with ZeRO-3.
    """
    zero = settings.get("zero_optimization", {})
    whole, trained = parameters(student), parameters(student, trainable=True)
    shards = world if stage(settings) else 1
    # Stage 1 shards only the optimizer's state.
    gradients = -(-_FLOAT32 * trained // (world if stage(settings) > 1 else 1))
    optimizer = -(-3 * _FLOAT32 * trained // shards)
    weights, gathered, offloaded = whole * width, 0, 0
    if quantized and (packed := quantized_weights(student)):
        weights -= sum(count * width - stored_bytes(count) for count in packed)
        gathered = max(packed) * width
    if stage(settings) == 3:
        threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
        small = sum(p.numel() for p in student.parameters() if p.numel() < threshold)
        weights = -(-whole * width // world) + small * width
        live = min(whole - small, int(zero.get("stage3_max_live_parameters", _LIVE))) * width
        gathered = 0 if world == 1 else live
    if zero.get("offload_param"):
        offloaded, weights = weights, 0
    if zero.get("offload_optimizer"):
        offloaded, gradients, optimizer = offloaded + gradients + optimizer, 0, 0
    bucket = _FLOAT32 * min(int(zero.get("reduce_bucket_size", 500_000_000)), trained) if stage(settings) > 1 else 0
    teacher = sum(p.nbytes for each in teachers if each.runs for p in each.tower.parameters())
    return State(weights, gathered, gradients, optimizer, bucket, teacher, offloaded)


@dataclass(frozen=True)
class PerSample:
    """Bytes per sample of a micro-batch.

    With L tokens, K of them supervised, N image tokens, V vocabulary, widths D (student) and E (teacher), and b bytes
    per value:

    Attributes:
        activations: what autograd saves in the language model (`shapes.saved_bytes`).
        logits: K V (2 b + 12): the logits and their gradient, and in float32 their copy, its softmax and the gradient.
        losses: N D (b + 8) + 8 N E for each teacher, and 8 L, per tapped block: the image tokens, their stored float32
            gradient and its product with the outer one, the teacher's resampled features in float32, the attention map
            and its gradient.
        towers: 8 tokens * width * b of the larger tower, one block of which is in memory at a time; all blocks of a
            student's tower that is trained.
    """

    activations: int
    logits: int
    losses: int
    towers: int

    @property
    def total(self) -> int:
        """Bytes per sample."""
        return self.activations + self.logits + self.losses + self.towers


def per_sample(
    student: Student, teachers: Sequence[TeacherShape], activations: int, length: int, supervised: int, width: int
) -> PerSample:
    """Return the bytes per sample; the formulas are those of `PerSample`.

    Args:
        student: on the meta device.
        teachers: the teachers on the meta device.
        activations: bytes that autograd saves in the language model.
        length: L, tokens of a sample.
        supervised: K, supervised tokens of a sample.
        width: b, bytes per value.
    """
    tokens, hidden = student.spec.image.count, student.spec.width
    vocabulary = student.spec.model.get_input_embeddings().weight.shape[0]
    losses = sum(tokens * hidden * (width + 8) + 8 * tokens * each.tower.width for each in teachers)
    losses = (losses + (8 * length if teachers else 0)) * len(student.layers)
    patches, vision = vision_tokens(student)
    kept = vision_blocks(student) if "vision_tower" in student.trainable() else 1
    sides = [patches * _stream(vision) * kept]
    sides += [each.tower.grid.size * _stream(each.tower.width) for each in teachers if each.runs]
    return PerSample(activations, supervised * vocabulary * (2 * width + 12), losses, max(sides) * width)


def _stream(width: int) -> int:
    """Values per token of a block: input, output, normalized input, attention, and an MLP of four times the width."""
    return 8 * width


def largest_micro_batch(memory: float, fixed: int, each: int, limit: int) -> int:
    """Return the largest micro-batch that fits into USABLE of the memory, at most `limit`; 0 if none does.

    Args:
        memory: bytes of the GPU.
        fixed: bytes that do not depend on the micro-batch.
        each: bytes per sample.
        limit: samples per step and rank.
    """
    return max(0, min(limit, int((USABLE * memory - fixed) // each)))
