"""The kernels: one small step of the implementation that the run would use, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from medalign import distributed
from medalign.config import Config
from medalign.doctor.finding import Finding
from medalign.kernels import attention_map, token_similarity

# Relative to the largest reference value. Tensor cores round float32 products to TF32 (10 bits, 1e-3 per product);
# a defective GPU or a wrong kernel is off by far more.
_TOLERANCE = 1e-2
_Operation = Callable[[str, list[torch.Tensor]], torch.Tensor]


def check_kernels(config: Config) -> Finding:
    """Compare values and gradients of both operations. Raises KernelError if the implementation cannot run."""
    device, impl = distributed.device(), config.losses.impl
    draw = torch.Generator().manual_seed(0)
    tokens, width = 64, 32
    features = [torch.randn(2, tokens, width, generator=draw) for _ in range(2)]
    heads = [torch.randn(2, count, tokens, width, generator=draw) for count in (4, 2)]
    found = {
        "token_similarity": _difference(_similarity, features, impl, device),
        "attention_map": _difference(_attention, heads, impl, device),
    }
    text = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    detail = f"{impl} on {device.type}, largest difference from the reference: {text}"
    if all(value <= _TOLERANCE for value in found.values()):  # False for NaN too
        return Finding("kernels", "ok", detail)
    return Finding("kernels", "error", detail, "do not train on this device; see `medalign bench kernels`")


def _similarity(impl: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    return token_similarity(*inputs, impl=impl)


def _attention(impl: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    query, key = inputs
    places = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    return attention_map(query, key, places >= 48, places < 32, impl=impl)


def _difference(operation: _Operation, inputs: list[torch.Tensor], impl: str, device: torch.device) -> float:
    """Return the largest difference of value and gradient, relative to the reference's largest entry."""
    results = []
    for name in (impl, "reference"):
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs]
        value = operation(name, leaves)
        value.square().sum().backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        results.append([value.detach(), *gradients])
    pairs = zip(*results, strict=True)
    shares = [(one - other).abs().max() / other.abs().max() for one, other in pairs]
    return float(torch.stack(shares).max())  # unlike the maximum of floats, NaN if any is NaN
