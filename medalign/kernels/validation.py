"""What every kernel demands of its arguments. Each message names the argument, what it is, and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_features(operation: str, name: str, tensor: torch.Tensor, dimensions: str) -> None:
    """A floating tensor with as many dimensions as there are letters in `dimensions`, e.g. "BND"."""
    if not torch.is_tensor(tensor):
        raise ValueError(f"{operation}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != len(dimensions) or not tensor.is_floating_point():
        wanted = ", ".join(dimensions)
        raise ValueError(f"{operation}: {name} must be a floating tensor [{wanted}], got {describe(tensor)}")


def require_shape(operation: str, name: str, tensor: torch.Tensor, shape: Sequence[int], because: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{operation}: {name} must have shape {tuple(shape)} to go with {because}, got {describe(tensor)}"
        )


def require_mask(operation: str, name: str, mask: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """A bool tensor of `shape` on the device of `like`."""
    if not torch.is_tensor(mask):
        raise ValueError(f"{operation}: {name} must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{operation}: {name} must be bool, got {describe(mask)}; use mask != 0")
    require_shape(operation, name, mask, shape, "the other arguments")
    require_device(operation, name, mask, like)


def require_device(operation: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, the first argument on {like.device}; move one")


def require_numbers(operation: str, result: torch.Tensor, **inputs: torch.Tensor) -> None:
    """Refuse a result that is not finite, and name the inputs that are not.

    On the CPU alone: to look, the host would have to wait for another device at every step. There the result carries
    the NaN into the loss, and the trainer stops at it.
    """
    if result.device.type != "cpu" or torch.isfinite(result).all():
        return
    guilty = [name for name, tensor in inputs.items() if not torch.isfinite(tensor).all()]
    raise ValueError(
        f"{operation}: NaN or infinity at tokens that count, in {' and '.join(guilty) or 'no input alone'}; "
        "leave such tokens out by the mask, or look for the layer that makes them"
    )


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any of the inputs is, else float32: half precision is never summed in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
