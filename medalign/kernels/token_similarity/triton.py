"""Token similarity on a GPU: Triton kernels for value and gradient in one pass; memory linear in the tokens.

With unit rows s_i, t_i, and D_ij = s_i . s_j - t_i . t_j, as in `chunked`:

    loss    = 1 / n^2 * sum_ij w_i w_j D_ij^2
    dl/dx_i = 4 w_i / (n^2 |x_i|) * (sum_j w_j D_ij s_j - r_i s_i),      r_i = sum_j w_j D_ij (s_i . s_j)

Operations per image of the alternatives, for N tokens, d and b channels, and panels of P rows:

    autograd on the eager form                        2 N^2 (3d + b)    four N x N float32 matrices
    recomputation in the backward pass                2 N^2 (3d + 2b)
    one pass, gradient rows kept on chip              2 N^2 (2d + b)    64 rows x 4096 x 4 bytes = 1 MB: no room
    one pass, D recomputed for each 256 channels      2 N^2 (d + (d + b) d / 256): 20 times as much at d = 4096
    one pass, D in panels of P rows                   2 N^2 (2d + b)    P N elements written and read once
    the same, upper half of the diagonal squares      N^2 (2 (2d + b) - (d + b) P / N); at N <= P  N^2 (3d + b)
    upper half of everything, transposed panels       N^2 (3d + b)      but dl/dx lives in float32 and is read and
                                                                        written N / P times

The last but one is used. For an image of 576 tokens it takes the fewest operations known, in two launches. For more
tokens it needs no accumulation in memory: one program writes each result once, in a fixed order, without atomics, so
two runs are equal to the bit. The normalization needs no extra pass: norms scale finished products (so that products of
half-precision features are exact), the factors of D's columns are applied to the panel, and r_i is a sum over D's tile.
The panel has the dtype of the features, as tensor cores require; in float16, whose range is small, the column factors
are scaled to at most 1. Float32 is multiplied as three TF32 products, which preserves its accuracy.

The upstream gradient is one number per sample: the backward pass is one multiplication in float32, rounded once.
"""

from __future__ import annotations

import torch

from medalign.kernels import gpu
from medalign.kernels.token_similarity import tile_table
from medalign.kernels.token_similarity.stored_gradient import with_stored_gradient
from medalign.kernels.token_similarity.triton_launches import BOUNDARY, Group, is_aligned, panels

WORKSPACE_ELEMENTS = 2**25  # samples are computed together while their panels stay below this (64 MB in half precision)


def available(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """Why the kernels cannot run on `device` with these dtypes of student and teacher, and the remedy; or None."""
    refusal = gpu.refusal(device, student, teacher)
    if refusal:
        return refusal
    needed = tile_table.shared_memory(gpu.architecture(device), student, teacher)
    there = gpu.shared_memory(device)
    if needed > there:
        return f'a program needs {needed} bytes of shared memory and {device} has {there}; choose impl="chunked"'
    return None


def token_similarity(
    student_BND: torch.Tensor,
    teacher_BND: torch.Tensor,
    mask_BN: torch.Tensor | None,
    weight_BN: torch.Tensor | None,
) -> torch.Tensor:
    """See `medalign.kernels.token_similarity`."""
    samples, tokens, _ = student_BND.shape
    count, height = panels(tokens)
    together = max(1, WORKSPACE_ELEMENTS // max(1, count * height**2))

    def compute(gradient_BND: torch.Tensor | None) -> torch.Tensor:
        loss_B = student_BND.new_zeros(samples, dtype=torch.float32)
        for first in range(0, samples if tokens else 0, together):
            group = slice(first, first + together)
            loss_B[group] = Group(
                _by_channel(student_BND[group]),
                _by_channel(_teacher(teacher_BND[group], student_BND.dtype)),
                None if mask_BN is None else mask_BN[group],
                None if weight_BN is None else weight_BN[group],
                None if gradient_BND is None else gradient_BND[group],
            ).loss()
        return loss_B

    return with_stored_gradient(student_BND, torch.float32, compute)


def _by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous channels and, where their number allows it, aligned tokens for wide loads."""
    if tensor.stride(-1) == 1 and (tensor.shape[-1] % BOUNDARY or is_aligned(tensor)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _teacher(teacher: torch.Tensor, student_dtype: torch.dtype) -> torch.Tensor:
    """The teacher in the student's dtype or in float32, whichever is lossless; this limits the number of binaries."""
    return teacher if teacher.dtype == student_dtype else teacher.float()
