"""A training step on shapes: weights and pixels on the meta device, tokens and masks with their values on the CPU.

Where an operation takes both, the values are dropped, except those that decide a shape: indices, and masks used as
indices. A tensor of whole numbers or truth values that would be moved to the meta device stays on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from medalign.contracts import IGNORE, Batch
from medalign.kernels import dispatch, validation
from medalign.student.families.base import ModelSpec

_ATEN = torch.ops.aten
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside the context, tensors on the CPU and on the meta device may meet in an operation and in the kernels."""
    with pytest.MonkeyPatch.context() as patch, _Constants(), _Mixed():
        patch.setattr(validation, "require_device", lambda *_: None)
        patch.setattr(dispatch, "run", lambda implementation, *arguments: implementation(*arguments))  # no autocast
        yield


def batch_on_meta(spec: ModelSpec, samples: int, length: int, teacher_size: int, question: int = 20) -> Batch:
    """Build a padded batch of one image per sample: ten tokens, the image, a question, and an answer up to `length`."""
    start, end = 10, 10 + spec.image.count
    ids = torch.full((samples, length), 7)
    ids[:, start:end] = spec.image_token_id
    labels = torch.full((samples, length), IGNORE)
    labels[:, end + question :] = 7
    asked = torch.zeros(samples, length, dtype=torch.bool)
    asked[:, end : end + question] = True
    index = torch.full((samples, length), -1)
    index[:, start:end] = torch.arange(samples)[:, None]
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones(samples, length, dtype=torch.bool),
        labels=labels,
        question_mask=asked,
        image_index=index,
        student_pixels=torch.empty(samples, 3, spec.image_size, spec.image_size, device="meta"),
        teacher_pixels=torch.empty(samples, 3, teacher_size, teacher_size, device="meta"),
        image_weight=torch.ones(samples),
        patch_valid=torch.ones(samples, spec.grid.size, dtype=torch.bool),
        image_sample=torch.arange(samples),
    )


class _Constants(TorchFunctionMode):
    """Numbers that Python code writes onto the meta device keep their values, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.arange, torch.linspace) and str(kwargs.get("device")) == "meta":
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


class _Mixed(TorchDispatchMode):
    """Operations on tensors of both devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN._to_copy.default and str(kwargs.get("device")) == "meta" and not args[0].is_floating_point():
            return func(*args, **kwargs | {"device": args[0].device})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if {tensor.device.type for tensor in tensors} == {"cpu", "meta"}:
            if func in _INDEXING:
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = tree_map(_without_values, (args, kwargs))
        return func(*args, **kwargs)


def _positions(indices: Any) -> list[Any]:
    """Replace masks by the positions where they are True."""
    found: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if is_mask else [index]
    return found


def _without_values(value: Any) -> Any:
    """Move a tensor to the meta device; a scalar may stay where it is."""
    if isinstance(value, torch.Tensor) and value.dim():
        return torch.empty_like(value, device="meta")
    return value
