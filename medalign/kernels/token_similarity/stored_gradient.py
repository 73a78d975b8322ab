"""Losses whose gradient is computed together with the value and stored until the backward pass.

The upstream gradient is one number per sample, so the backward pass only scales the stored gradient.

B samples, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Compute = Callable[[torch.Tensor | None], torch.Tensor]


def with_stored_gradient(student_BND: torch.Tensor, dtype: torch.dtype, compute: Compute) -> torch.Tensor:
    """Compute a loss, and its gradient if the student needs one.

    Args:
        student_BND: the tensor that receives the gradient.
        dtype: in which the loss is computed.
        compute: returns the loss [B]. Its argument is the tensor [B, N, D] to which it writes the gradient with respect
            to the student, or None if no gradient is needed.

    Returns:
        The loss [B].
    """
    # bfloat16 has the range of float32 and can store the gradient; in float16, a gradient over N^2 would vanish.
    kept = dtype if student_BND.dtype == torch.float16 else student_BND.dtype
    needed = torch.is_grad_enabled() and student_BND.requires_grad
    loss_B: torch.Tensor = _StoredGradient.apply(student_BND, kept if needed else None, compute)
    return loss_B


class _StoredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_BND: torch.Tensor, kept: torch.dtype | None, compute: Compute) -> torch.Tensor:
        gradient_BND = None
        if kept is not None:
            gradient_BND = torch.empty(student_BND.shape, dtype=kept, device=student_BND.device)
        loss_B = compute(gradient_BND)
        ctx.save_for_backward(gradient_BND)
        ctx.student_dtype = student_BND.dtype
        return loss_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_B: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BND,) = ctx.saved_tensors
        # The product is computed in the wider of the two types and rounded once.
        scaled_BND = torch.empty_like(gradient_BND, dtype=ctx.student_dtype)
        torch.mul(gradient_BND, upstream_B[:, None, None], out=scaled_BND)
        return scaled_BND, None, None
