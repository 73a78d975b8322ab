"""Every binary of the token similarity kernels that can be launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from medalign.benchmark.kernels.case import Binary
from medalign.kernels.token_similarity import tile_table, triton_launches
from medalign.kernels.token_similarity.reference import SMALLEST_NORM
from medalign.kernels.token_similarity.tile_table import Tile

# As `triton._teacher` converts: the teacher in the student's dtype or in float32.
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((_BF16, _BF16), (_BF16, _F32), (_F16, _F16), (_F16, _F32), (_F32, _F32))
_NAMES = {_F32: "fp32", _BF16: "bf16", _F16: "fp16"}
_SIZES = ("padded", "width", "teacher_width", "height", "sums_by_kind")
_STRIDES = ("student_by_sample", "student_by_token", "teacher_by_sample", "teacher_by_token")
_CHANGING = ("tokens", "top")
_VECTORS = ("inverse_student", "inverse_teacher", "inverse", "clean_weight", "weight", "factor")
_FLOATS = (*_VECTORS, "along", "share", "undo", "sums")


def binaries(architecture: str) -> Iterator[Binary]:
    """The binaries of one architecture, with the argument types and alignment that `triton` passes."""
    tiles = tile_table.table()[architecture]
    for student, teacher in PAIRS:
        yield _prepare(student, teacher)
        for kind in tile_table.kinds("differences", student, teacher):
            for gradient in (True, False):
                yield _differences(student, teacher, tiles["differences"][kind], gradient, kind)
    for student in _NAMES:
        for kind in tile_table.kinds("gradients", student):
            for masked in (False, True):
                yield _gradients(student, tiles["gradients"][kind], masked, kind)


def _prepare(student: torch.dtype, teacher: torch.dtype) -> Binary:
    constants = {
        "SMALLEST": SMALLEST_NORM,
        "MASKED": True,
        "WEIGHTED": True,
        "ROWS": triton_launches.PREPARE_ROWS,
        "CHANNELS": triton_launches.PREPARE_CHANNELS,
    }
    name = f"prepare {_NAMES[student]}/{_NAMES[teacher]}"
    return _binary("prepare", name, student, teacher, constants, Tile(0, 0, 0, 4, 3), tensor_cores=False)


def _differences(student: torch.dtype, teacher: torch.dtype, tile: Tile, gradient: bool, kind: str) -> Binary:
    constants = {
        "GRADIENT": gradient,
        "PRECISION": triton_launches.precision(student),
        "TEACHER_PRECISION": triton_launches.precision(teacher),
        "BLOCK": tile.rows,
        "CHANNELS": tile.depth,
    }
    what = f"{kind}{'' if gradient else ', value only'}"
    name = f"differences {_NAMES[student]}/{_NAMES[teacher]} ({what})"
    return _binary("differences", name, student, teacher, constants, tile, "odd" not in kind)


def _gradients(student: torch.dtype, tile: Tile, masked: bool, kind: str) -> Binary:
    constants = {
        "MASKED": masked,
        "PRECISION": triton_launches.precision(student),
        "ROWS": tile.rows,
        "CHANNELS": tile.columns,
        "DEPTH": tile.depth,
    }
    name = f"gradients {_NAMES[student]} ({kind}{', masked' if masked else ''})"
    return _binary("gradients", name, student, student, constants, tile, "odd" not in kind)


def _binary(
    kernel: str,
    name: str,
    student: torch.dtype,
    teacher: torch.dtype,
    constants: Mapping[str, Any],
    tile: Tile,
    aligned: bool = True,
    tensor_cores: bool = True,
) -> Binary:
    from medalign.kernels.token_similarity import triton_kernels

    own = f"*{_NAMES[student]}"
    types = dict.fromkeys((*_SIZES, *_STRIDES, *_CHANGING), "i32") | dict.fromkeys(_FLOATS, "*fp32")
    types |= {"student": own, "panel": own, "teacher": f"*{_NAMES[teacher]}", "mask": "*u8", "extent": "*i32"}
    types["gradient"] = "*fp32" if student == torch.float16 else own
    function = getattr(triton_kernels, kernel)
    used = {argument: types[argument] for argument in function.arg_names if argument not in constants}
    odd = set(_CHANGING) | (set() if aligned else {"width", "teacher_width", *_STRIDES})
    divisible = tuple(argument for argument in used if argument not in odd)
    return Binary(name, function, used, constants, tile.warps, tile.stages, divisible, tensor_cores)
