"""The layers of a student that get an adapter."""

from __future__ import annotations

import logging
import re

from torch import nn

from medalign import distributed
from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec

log = logging.getLogger("medalign")


def warn_about_experts(config: StudentConfig, spec: ModelSpec) -> None:
    """Warn if a language model with a mixture of experts has experts that LoRA cannot adapt.

    transformers keeps all experts of a block in one tensor of three dimensions, which is no linear layer.
    """
    experts = [p for block in spec.blocks for p in block.parameters() if p.ndim == 3]
    if config.train == "lora" and experts and distributed.is_main():
        log.warning(
            "student.lora does not reach the experts of the student's mixture: %d parameters in %d tensors get no "
            "adapter and stay frozen; student.train full trains them",
            sum(p.numel() for p in experts),
            len(experts),
        )


def lora_layers(config: StudentConfig, spec: ModelSpec) -> list[str]:
    """Return the names in the model of the linear layers inside its blocks that `student.lora.targets` matches.

    The official form of the query mixture replaces the adapter of its projection.

    Raises:
        ConfigError: the pattern is not one, or matches no layer.
    """
    replaced = config.query_mixture and config.query_mixture_form == "official"
    skipped = spec.query_projection(config.layers[0])[0] if replaced else None
    inside = re.compile(rf"{re.escape(spec.decoder)}\.layers\.\d+\.")
    layers = {  # name in the model -> name in its block
        name: inside.sub("", name)
        for name, module in spec.model.named_modules()
        if isinstance(module, nn.Linear) and module is not skipped and inside.match(name)
    }
    if not layers:
        raise ConfigError("the student's blocks contain no linear layer (torch.nn.Linear) that LoRA can adapt")
    pattern = config.lora.targets
    try:
        chosen = [name for name, own in layers.items() if re.search(pattern, own)]
    except re.error as error:
        raise ConfigError(f"student.lora.targets {pattern!r} is not a regular expression: {error}") from error
    if not chosen:
        raise ConfigError(
            f"student.lora.targets {pattern!r} matches no linear layer of a block; they are "
            f"{', '.join(sorted(set(layers.values())))}"
        )
    return chosen
