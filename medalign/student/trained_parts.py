"""What is trained in a student besides adapters, W and the mixture: projector, vision tower, language model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from transformers.modeling_utils import set_zero3_state

from medalign.config import StudentConfig
from medalign.student.families.base import ModelSpec


def freeze_other_parts(config: StudentConfig, spec: ModelSpec) -> None:
    """Freeze a model except for the parts that the settings name. Adapters are not a part of it."""
    for parameter in spec.model.parameters():
        parameter.requires_grad_(False)
    for parameter in _trained(config, spec):
        parameter.requires_grad_(True)


def _trained(config: StudentConfig, spec: ModelSpec) -> Iterator[nn.Parameter]:
    projector = {id(p) for p in spec.projector.parameters()}  # in some models, the end of the tower
    if config.train_projector:
        yield from spec.projector.parameters()
    if config.train_vision_tower:
        unused = unused_in_tower(spec)
        tower = spec.vision_tower.named_parameters()
        yield from (p for name, p in tower if id(p) not in projector and name not in unused)
    if config.train == "full":
        yield from chain(spec.language_model.parameters(), spec.model.get_output_embeddings().parameters())


def unused_in_tower(spec: ModelSpec) -> set[str]:
    """Return the names of the tower's parameters that no image token depends on.

    Such are the blocks after the one whose output LLaVA takes. They would get no gradient, and under ZeRO an optimizer
    state all the same. They are found by a backward pass of a twin of the model on the meta device.
    """
    if not spec.family.runs_without_data:  # towers of Qwen, which are used as a whole
        return set()
    with set_zero3_state(), torch.device("meta"):  # the twin is not partitioned: it has no values
        twin = type(spec.model)(spec.model.config)
    family, size = spec.family, spec.image_size
    copy = family.inspect(twin)
    named = dict(copy.vision_tower.named_parameters())
    pixels = torch.empty(1, 3, size, size, device="meta", dtype=next(iter(named.values())).dtype)
    with torch.enable_grad():
        features = family.features(copy, pixels)
        gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
