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

from typing import Any

import torch

from medalign.kernels import gpu
from medalign.kernels.token_similarity import tile_table
from medalign.kernels.token_similarity.reference import SMALLEST_NORM
from medalign.kernels.token_similarity.tile_table import GRAIN

TALLEST_PANEL = 2048  # rows; 16 row tiles x the channel tiles fill a GPU
WORKSPACE_ELEMENTS = 2**25  # samples are computed together while their panels stay below this (64 MB in half precision)
BOUNDARY = 16  # alignment in elements, and of addresses in bytes
PREPARE_ROWS, PREPARE_CHANNELS = 8, 512


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
    differentiate = torch.is_grad_enabled() and student_BND.requires_grad
    return _TokenSimilarity.apply(student_BND, teacher_BND, mask_BN, weight_BN, differentiate)


class _TokenSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_BND: torch.Tensor,
        teacher_BND: torch.Tensor,
        mask_BN: torch.Tensor | None,
        weight_BN: torch.Tensor | None,
        differentiate: bool,
    ) -> torch.Tensor:
        samples, tokens, _ = student_BND.shape
        loss_B = student_BND.new_zeros(samples, dtype=torch.float32)
        gradient_BND = None
        if differentiate:
            # bfloat16 has the range of float32 and can store the gradient; float16 would lose a gradient over N^2.
            kept = torch.float32 if student_BND.dtype == torch.float16 else student_BND.dtype
            gradient_BND = torch.empty(student_BND.shape, dtype=kept, device=student_BND.device)
        count, height = panels(tokens)
        together = max(1, WORKSPACE_ELEMENTS // max(1, count * height**2))
        for first in range(0, samples if tokens else 0, together):
            group = slice(first, first + together)
            loss_B[group] = _Group(
                _by_channel(student_BND[group]),
                _by_channel(_teacher(teacher_BND[group], student_BND.dtype)),
                None if mask_BN is None else mask_BN[group],
                None if weight_BN is None else weight_BN[group],
                None if gradient_BND is None else gradient_BND[group],
            ).loss()
        ctx.save_for_backward(gradient_BND)
        ctx.student_dtype = student_BND.dtype
        return loss_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_B: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BND,) = ctx.saved_tensors
        scaled_BND = torch.empty_like(gradient_BND, dtype=ctx.student_dtype)
        torch.mul(gradient_BND, upstream_B[:, None, None], out=scaled_BND)
        return scaled_BND, None, None, None, None


def panels(tokens: int) -> tuple[int, int]:
    """The number of panels and their common height, a multiple of `GRAIN`: as few panels as `TALLEST_PANEL` allows."""
    count = max(1, -(-tokens // TALLEST_PANEL))
    return count, -(-tokens // (count * GRAIN)) * GRAIN


def _by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous channels and, where their number allows it, aligned tokens for wide loads."""
    if tensor.stride(-1) == 1 and (tensor.shape[-1] % BOUNDARY or _aligned(tensor)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether Triton compiles wide loads for it: addresses and strides are multiples of 16."""
    steps = tensor.stride(0), tensor.stride(1), tensor.shape[-1], tensor.data_ptr()
    return not any(step % BOUNDARY for step in steps)


def _teacher(teacher: torch.Tensor, student_dtype: torch.dtype) -> torch.Tensor:
    """The teacher in the student's dtype or in float32, whichever is lossless; this limits the number of binaries."""
    return teacher if teacher.dtype == student_dtype else teacher.float()


class _Group:
    """Samples that share their launches. Never waits for the device."""

    def __init__(
        self,
        student_GND: torch.Tensor,
        teacher_GND: torch.Tensor,
        mask_GN: torch.Tensor | None,
        weight_GN: torch.Tensor | None,
        gradient_GND: torch.Tensor | None,
    ) -> None:
        self.student_GND, self.teacher_GND, self.gradient_GND = student_GND, teacher_GND, gradient_GND
        self.mask_GN, self.weight_GN = mask_GN, weight_GN
        self.samples, self.tokens, self.width = student_GND.shape
        self.panels, self.height = panels(self.tokens)
        self.padded = self.panels * self.height
        architecture, dtypes = gpu.architecture(student_GND.device), (student_GND.dtype, teacher_GND.dtype)
        aligned = _aligned(student_GND) and _aligned(teacher_GND)
        self.difference_tile = tile_table.differences(architecture, dtypes, aligned, self.tokens, self.samples)
        self.gradient_tile = tile_table.gradients(architecture, dtypes[0], _aligned(student_GND))
        self._count(mask_GN)

    def loss(self) -> torch.Tensor:
        """[G]; the gradient is left in `gradient_GND`."""
        with torch.cuda.device_of(self.student_GND):
            self._prepare()
            loss_G = torch.zeros_like(self.share_G)
            for top in range(0, self.padded, self.height):
                loss_G += self._panel(top)
        return loss_G * (self.share_G / 4)

    def _count(self, mask_GN: torch.Tensor | None) -> None:
        """Tokens up to the last valid one, and 4 / n^2, of each sample."""
        device = self.student_GND.device
        if mask_GN is None:
            self.extent_G = torch.full((self.samples,), self.tokens, dtype=torch.int32, device=device)
            self.share_G = torch.full((self.samples,), 4 / self.tokens**2, device=device)
            return
        place_N = torch.arange(1, self.tokens + 1, dtype=torch.int32, device=device)
        self.extent_G = (place_N * mask_GN).amax(1)
        self.share_G = 4 / mask_GN.sum(1).float().clamp_min(1).square()

    def _prepare(self) -> None:
        vectors = self.share_G.new_empty(4, self.samples, self.padded)
        self.inverse_student_GN, self.inverse_teacher_GN, self.clean_weight_GN, self.factor_GN = vectors
        dummy = self.extent_G
        _launch(
            "prepare",
            (-(-self.padded // PREPARE_ROWS), self.samples),
            **self._features(),
            mask=dummy if self.mask_GN is None else self.mask_GN.contiguous().view(torch.uint8),
            weight=dummy if self.weight_GN is None else self.weight_GN.float().contiguous(),
            clean_weight=self.clean_weight_GN,
            factor=self.factor_GN,
            SMALLEST=SMALLEST_NORM,
            MASKED=self.mask_GN is not None,
            WEIGHTED=self.weight_GN is not None,
            ROWS=PREPARE_ROWS,
            CHANNELS=PREPARE_CHANNELS,
        )
        self.undo_G = torch.ones_like(self.share_G)
        if self.student_GND.dtype == torch.float16:
            largest_G = self.factor_GN.abs().amax(1)
            self.undo_G = torch.where(largest_G > 0, largest_G, 1.0)
            self.factor_GN /= self.undo_G[:, None]

    def _panel(self, top: int) -> torch.Tensor:
        """The sum over the panel's rows [G]; also writes the gradient of these rows."""
        tile, height = self.difference_tile, self.height
        wanted = self.gradient_GND is not None
        shape = (self.samples, height, self.padded)
        panel_GPN = self.student_GND.new_empty(shape) if wanted else self.student_GND
        sums = self.share_G.new_empty(1 + wanted, self.samples, self.padded // tile.columns, height)
        _launch(
            "differences",
            (height // tile.rows, self.padded // tile.columns, self.samples),
            **self._features(),
            weight=self.clean_weight_GN,
            factor=self.factor_GN,
            extent=self.extent_G,
            panel=panel_GPN,
            sums=sums,
            top=top,
            height=height,
            sums_by_kind=sums.stride(0),
            GRADIENT=wanted,
            PRECISION=precision(self.student_GND.dtype),
            TEACHER_PRECISION=precision(self.teacher_GND.dtype),
            BLOCK=tile.rows,
            CHANNELS=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        rows = sums.sum(2)
        if wanted:
            self._gradient(top, panel_GPN, rows[1])
        return rows[0].sum(1)

    def _gradient(self, top: int, panel_GPN: torch.Tensor, along_GP: torch.Tensor) -> None:
        tile = self.gradient_tile
        _launch(
            "gradients",
            (self.height // tile.rows, -(-self.width // tile.columns), self.samples),
            panel=panel_GPN,
            student=self.student_GND,
            inverse=self.inverse_student_GN,
            weight=self.clean_weight_GN,
            along=along_GP,
            extent=self.extent_G,
            share=self.share_G,
            undo=self.undo_G,
            gradient=self.gradient_GND,
            top=top,
            height=self.height,
            tokens=self.tokens,
            padded=self.padded,
            width=self.width,
            student_by_sample=self.student_GND.stride(0),
            student_by_token=self.student_GND.stride(1),
            MASKED=self.mask_GN is not None,
            PRECISION=precision(self.student_GND.dtype),
            ROWS=tile.rows,
            CHANNELS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _features(self) -> dict[str, Any]:
        """The arguments of the kernels that read student and teacher."""
        return {
            "student": self.student_GND,
            "teacher": self.teacher_GND,
            "inverse_student": self.inverse_student_GN,
            "inverse_teacher": self.inverse_teacher_GN,
            "tokens": self.tokens,
            "padded": self.padded,
            "width": self.width,
            "teacher_width": self.teacher_GND.shape[2],
            "student_by_sample": self.student_GND.stride(0),
            "student_by_token": self.student_GND.stride(1),
            "teacher_by_sample": self.teacher_GND.stride(0),
            "teacher_by_token": self.teacher_GND.stride(1),
        }


def precision(dtype: torch.dtype) -> str:
    """The precision of tensor-core products: three TF32 products for float32, exact products for half precision."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _launch(kernel: str, grid: tuple[int, ...], **arguments: Any) -> None:
    # Imported on first use: Triton is slow to import and not installed everywhere.
    from medalign.kernels.token_similarity import triton_kernels

    getattr(triton_kernels, kernel)[grid](**arguments)
