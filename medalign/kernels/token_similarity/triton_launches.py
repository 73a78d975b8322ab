"""The kernel launches of token similarity for a group of samples; `triton.py` explains the design.

G samples of a group, P rows of a panel, N tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch

from medalign.kernels import gpu
from medalign.kernels.token_similarity import tile_table
from medalign.kernels.token_similarity.reference import SMALLEST_NORM
from medalign.kernels.token_similarity.tile_table import GRAIN

TALLEST_PANEL = 2048  # rows; 16 row tiles x the channel tiles fill a GPU
BOUNDARY = 16  # alignment in elements, and of addresses in bytes
PREPARE_ROWS, PREPARE_CHANNELS = 8, 512


def panels(tokens: int) -> tuple[int, int]:
    """The number of panels and their common height, a multiple of `GRAIN`: as few panels as `TALLEST_PANEL` allows."""
    count = max(1, -(-tokens // TALLEST_PANEL))
    return count, -(-tokens // (count * GRAIN)) * GRAIN


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether Triton compiles wide loads for it: addresses and strides are multiples of 16."""
    steps = tensor.stride(0), tensor.stride(1), tensor.shape[-1], tensor.data_ptr()
    return not any(step % BOUNDARY for step in steps)


class Group:
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
        aligned = is_aligned(student_GND) and is_aligned(teacher_GND)
        self.difference_tile = tile_table.differences(architecture, dtypes, aligned, self.tokens, self.samples)
        self.gradient_tile = tile_table.gradients(architecture, dtypes[0], is_aligned(student_GND))
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
