"""Which implementation of a kernel runs. A path asked for by name is taken or refused, never replaced."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from medalign.errors import KernelError

AUTO = "auto"
_LOGGER = logging.getLogger(__name__)

Implementations = Mapping[str, Callable[..., torch.Tensor]]


def choose(operation: str, impl: str, device: torch.device, known: Implementations) -> Callable[..., torch.Tensor]:
    """The implementation of `operation` to run on `device`.

    `impl` is a name in `known`, or "auto". The choice and its reason are logged once a process.
    Raises KernelError if `impl` is neither; the message lists what exists.
    """
    if impl == AUTO:
        name, reason = _automatic(device)
    elif impl in known:
        name, reason = impl, "asked for by name"
    else:
        available = ", ".join((AUTO, *known))
        raise KernelError(f'{operation}: impl="{impl}" does not exist here; choose one of: {available}')
    _announce(operation, name, device.type, reason)
    return known[name]


def _automatic(device: torch.device) -> tuple[str, str]:
    return "chunked", f"memory linear in the tokens; no device-specific kernel for {device.type}"


@functools.cache
def _announce(operation: str, name: str, device_type: str, reason: str) -> None:
    _LOGGER.info("%s on %s: %s (%s)", operation, device_type, name, reason)


def run(implementation: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call it outside autocast, which would otherwise round its float32 products to half precision."""
    device = next(argument.device for argument in arguments if torch.is_tensor(argument))
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)
