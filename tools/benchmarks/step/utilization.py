"""Model FLOPs utilization (MFU): the operations of the plain step, divided by what the GPU could compute in the time.

    MFU = FLOPs of the plain step / (seconds per step * peak FLOPs per second)

The numerator is the same for every form, so the teacher, the losses and eager attention lower the MFU. A multiply-add
counts as two operations:

- A linear layer of the language model: 2 per weight and token forward, 2 for the gradient of its input, and 2 for the
  gradient of its weights if they are trained (LoRA).
- Attention: two products over the causal half forward, and twice that backward.
- The output layer: at the kept positions only.
- The vision tower and the projector: forward only.

Every block is counted as if it passed a gradient to the one before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medalign.contracts import IGNORE, Batch
from medalign.student.model import Student

FORMULA = "FLOPs of the plain step / (seconds * peak); the same FLOPs for every form; see tools/benchmarks/step"
# Dense bf16 operations per second from the data sheets; the first name contained in the GPU's name is used.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak(card: str) -> float | None:
    """Return the peak of a GPU by its name, or None if it is not in the table."""
    return next((operations for name, operations in PEAKS.items() if name in card), None)


def card_name(device: torch.device) -> str:
    """Return the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def plain_flops(student: Student, batch: Batch) -> float:
    """Count the operations of one plain step, forward and backward."""
    samples, length = batch.input_ids.shape
    kept = int((batch.labels[:, 1:] != IGNORE).any(0).sum()) * samples
    model: Any = student.model.get_base_model()
    language: Any = student.spec.language_model.config
    tower = model.model.vision_tower
    blocks = sum(_linear(block) for block in student.spec.blocks) * samples * length
    head_width = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    causal = 2 * length**2 * head_width * language.num_attention_heads  # two products, 2 operations, half the pairs
    attention = 3 * causal * samples * len(student.spec.blocks)
    images, patches = len(batch.image_weight), student.spec.grid.size
    vision = tower.config
    vision_flops = _forward(tower) * images * (patches + 1)
    vision_flops += 4 * (patches + 1) ** 2 * vision.hidden_size * vision.num_hidden_layers * images
    projector_flops = _forward(student.spec.projector) * images * patches
    return blocks + attention + _linear(model.lm_head) * kept + vision_flops + projector_flops


def _linear(module: nn.Module) -> float:
    """Count the operations per token of all linear layers in a module, forward and backward."""
    return sum(
        (6 if layer.weight.requires_grad else 4) * layer.in_features * layer.out_features for layer in _layers(module)
    )


def _forward(module: nn.Module) -> float:
    return sum(2 * layer.in_features * layer.out_features for layer in _layers(module))


def _layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
