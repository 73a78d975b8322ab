"""Selection of an operation's implementation. An implementation requested by name runs or raises, with no fallback.

An operation lists its implementations by name. One that does not run everywhere comes with a condition, a function of
the device and the dtypes, which returns None if it can run and otherwise the reason and the remedy. "auto" selects the
fused kernels on CUDA where they can run, and the chunked implementation everywhere else: on the CPU, Triton could only
interpret a fused kernel.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from medalign.errors import KernelError

AUTO = "auto"
FUSED = "triton"
_LOGGER = logging.getLogger(__name__)

Implementations = Mapping[str, Callable[..., torch.Tensor]]
Conditions = Mapping[str, Callable[..., str | None]]


def choose(
    operation: str,
    impl: str,
    inputs: Sequence[torch.Tensor],
    known: Implementations,
    conditions: Conditions,
) -> Callable[..., torch.Tensor]:
    """Select the implementation of an operation. The choice and its reason are logged once per process.

    Args:
        operation: the operation's name, for messages.
        impl: "auto", or a name in `known`.
        inputs: the tensors of the call; the first determines the device.
        known: the implementations by name.
        conditions: the conditions of implementations that do not run everywhere.

    Returns:
        The implementation.

    Raises:
        KernelError: `impl` does not exist (the message lists the names that do), or its condition rejects the inputs.
    """
    device, dtypes = inputs[0].device, tuple(each.dtype for each in inputs)
    if impl == AUTO:
        name, reason = _automatic(device, dtypes, conditions)
    elif impl in known:
        name, reason = impl, "requested by name"
        refusal = conditions[name](device, *dtypes) if name in conditions else None
        if refusal:
            raise KernelError(f'{operation}: impl="{name}" cannot run: {refusal}')
    else:
        available = ", ".join((AUTO, *known))
        raise KernelError(f'{operation}: impl="{impl}" does not exist; choose one of: {available}')
    _announce(operation, name, device.type, reason)
    return known[name]


def _automatic(device: torch.device, dtypes: Sequence[torch.dtype], conditions: Conditions) -> tuple[str, str]:
    if device.type != "cuda" or FUSED not in conditions:
        return "chunked", f"memory linear in the tokens; no device-specific kernel for {device.type}"
    refusal = conditions[FUSED](device, *dtypes)
    if refusal:
        return "chunked", f"memory linear in the tokens; {FUSED} cannot run: {refusal}"
    return FUSED, "fused, memory linear in the tokens"


@functools.cache
def _announce(operation: str, name: str, device_type: str, reason: str) -> None:
    _LOGGER.info("%s on %s: %s (%s)", operation, device_type, name, reason)


def run(implementation: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call an implementation with autocast disabled, which would round its float32 products to half precision."""
    device = next(argument.device for argument in arguments if torch.is_tensor(argument))
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)
