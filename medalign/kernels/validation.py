"""Argument checks shared by the kernels. Each message names the argument, what was passed, and what is expected."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

log = logging.getLogger("medalign")


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_features(operation: str, name: str, tensor: torch.Tensor, dimensions: str) -> None:
    """Require a floating-point tensor with one dimension per letter of `dimensions`, for example "BND"."""
    if not torch.is_tensor(tensor):
        raise ValueError(f"{operation}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != len(dimensions) or not tensor.is_floating_point():
        wanted = ", ".join(dimensions)
        raise ValueError(f"{operation}: {name} must be a floating-point tensor [{wanted}], got {describe(tensor)}")


def require_shape(operation: str, name: str, tensor: torch.Tensor, shape: Sequence[int], because: str) -> None:
    """Require this shape; `because` names the arguments that it must match."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{operation}: {name} must have shape {tuple(shape)} to match {because}, got {describe(tensor)}"
        )


def require_mask(operation: str, name: str, mask: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Require a bool tensor of `shape` on the device of `like`."""
    if not torch.is_tensor(mask):
        raise ValueError(f"{operation}: {name} must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{operation}: {name} must be bool, got {describe(mask)}; use mask != 0")
    require_shape(operation, name, mask, shape, "the other arguments")
    require_device(operation, name, mask, like)


def require_device(operation: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Require the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(
            f"{operation}: {name} is on {tensor.device} and the first argument on {like.device}; move one of them"
        )


def warn_unless_finite(operation: str, result: torch.Tensor, **inputs: torch.Tensor) -> None:
    """Warn of a result that is not finite, and name the inputs that are not finite.

    It is not an error: the loss of the step is not finite either, and training leaves the step out on all ranks.

    Checked on the CPU only: on a GPU, the host would have to wait for the device at every step.
    """
    if result.device.type != "cpu" or torch.isfinite(result).all():
        return
    names = [name for name, tensor in inputs.items() if not torch.isfinite(tensor).all()]
    log.warning(
        "%s: NaN or infinity at valid tokens of %s; mask these tokens out, or look for the layer that produces them",
        operation,
        " and ".join(names) or "the result only",
    )


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any input is float64, otherwise float32: sums are never accumulated in half precision."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
