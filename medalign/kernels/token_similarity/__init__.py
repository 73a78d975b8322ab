"""The squared difference between the token similarities of student and teacher (the paper's L_vis)."""

from __future__ import annotations

import torch

from medalign.kernels import dispatch
from medalign.kernels.token_similarity import chunked, reference, triton
from medalign.kernels.validation import (
    require_device,
    require_features,
    require_mask,
    require_shape,
    warn_unless_finite,
)

_KNOWN = {
    "reference": reference.token_similarity,
    "chunked": chunked.token_similarity,
    "triton": triton.token_similarity,
}
_CONDITIONS = {"triton": triton.available}


def token_similarity(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Average `w_i w_j (cos(s_i, s_j) - cos(t_i, t_j))^2` over the valid pairs (i, j) of each sample.

    Args:
        student: `[B, N, d]`, any float dtype. The only argument that receives a gradient.
        teacher: `[B, N, b]`, any float dtype; treated as a constant.
        mask: `[B, N]` bool, True at valid tokens; None if all are valid.
        weight: `[B, N]` float, w; treated as a constant; None for 1. The sum is divided by the number of pairs, not by
            the sum of weights.
        impl: "auto", or an implementation by name.

    Returns:
        `[B]` float32 (float64 if student or teacher is float64). A sample without a valid token gives 0, with gradient
        0. A token of norm 0 has cosine 0 with every token and receives no gradient.

    Raises:
        ValueError: arguments do not match each other.
        KernelError: `impl` does not exist or cannot run; the message gives the reason and the remedy.
    """
    _validate(student, teacher, mask, weight)
    implementation = dispatch.choose("token_similarity", impl, (student, teacher), _KNOWN, _CONDITIONS)
    constants = (None if each is None else each.detach() for each in (teacher, mask, weight))
    loss = dispatch.run(implementation, student, *constants)
    warn_unless_finite("token_similarity", loss, student=student, teacher=teacher)
    return loss


def _validate(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None
) -> None:
    operation = "token_similarity"
    require_features(operation, "student", student, "BNd")
    require_features(operation, "teacher", teacher, "BNb")
    tokens = student.shape[:2]
    require_shape(operation, "teacher", teacher, (*tokens, teacher.shape[2]), f"student {tuple(student.shape)}")
    require_device(operation, "teacher", teacher, student)
    if mask is not None:
        require_mask(operation, "mask", mask, tokens, student)
    if weight is not None:
        require_features(operation, "weight", weight, "BN")
        require_shape(operation, "weight", weight, tokens, f"student {tuple(student.shape)}")
        require_device(operation, "weight", weight, student)
