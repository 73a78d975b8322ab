"""Token similarity for the benchmark: the binaries dispatch can choose, their cost, problems to measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from medalign.kernels.case import Binary
from medalign.kernels.token_similarity import configurations, triton
from medalign.kernels.token_similarity.configurations import Tile
from medalign.kernels.token_similarity.reference import SMALLEST_NORM

# What `triton._teacher` leaves: the teacher in the student's type or in float32.
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((_BF16, _BF16), (_BF16, _F32), (_F16, _F16), (_F16, _F32), (_F32, _F32))
_NAMES = {_F32: "fp32", _BF16: "bf16", _F16: "fp16"}
_SIZES = ("padded", "width", "teacher_width", "height", "sums_by_kind")
_STRIDES = ("student_by_sample", "student_by_token", "teacher_by_sample", "teacher_by_token")
_CHANGING = ("tokens", "top")
_FLOATS = ("inverse_student", "inverse_teacher", "inverse", "clean_weight", "weight", "factor", "along", "share", "undo", "sums")


def binaries(architecture: str) -> Iterator[Binary]:
    """Every configuration that a call can lead to on `architecture`; widths that are no multiple of 16 once a kernel."""
    for student, teacher in PAIRS:
        yield _prepare(student, teacher)
        for kind in configurations.kinds("differences", student, teacher):
            tile = configurations.table()[architecture]["differences"][kind]
            for gradient in (True, False):
                yield _differences(student, teacher, tile, gradient, kind)
    for student in (_BF16, _F16, _F32):
        for masked in (False, True):
            yield _gradients(student, configurations.gradients(architecture, student), masked)
    for odd in (_BF16, _F32):
        tile = configurations.differences(architecture, odd, odd, tokens=10**6, samples=1)
        yield _differences(odd, odd, tile, True, "odd width", aligned=False)
        yield _gradients(odd, configurations.gradients(architecture, odd), True, aligned=False)


def _prepare(student: torch.dtype, teacher: torch.dtype) -> Binary:
    constants = {
        "SMALLEST": SMALLEST_NORM,
        "MASKED": True,
        "WEIGHTED": True,
        "ROWS": triton.PREPARE_ROWS,
        "CHANNELS": triton.PREPARE_CHANNELS,
    }
    name = f"prepare {_NAMES[student]}/{_NAMES[teacher]}"
    return _binary("prepare", name, student, teacher, constants, Tile(0, 0, 0, 4, 3), tensor_cores=False)


def _differences(
    student: torch.dtype, teacher: torch.dtype, tile: Tile, gradient: bool, kind: str, aligned: bool = True
) -> Binary:
    constants = {
        "GRADIENT": gradient,
        "PRECISION": triton.precision(student),
        "TEACHER_PRECISION": triton.precision(teacher),
        "BLOCK": tile.rows,
        "CHANNELS": tile.depth,
    }
    what = f"{kind}{'' if gradient else ', value alone'}"
    name = f"differences {_NAMES[student]}/{_NAMES[teacher]} ({what})"
    return _binary("differences", name, student, teacher, constants, tile, aligned)


def _gradients(student: torch.dtype, tile: Tile, masked: bool, aligned: bool = True) -> Binary:
    constants = {
        "MASKED": masked,
        "PRECISION": triton.precision(student),
        "ROWS": tile.rows,
        "CHANNELS": tile.columns,
        "DEPTH": tile.depth,
    }
    name = f"gradients {_NAMES[student]} ({'masked' if masked else 'all tokens'}{'' if aligned else ', odd width'})"
    return _binary("gradients", name, student, student, constants, tile, aligned)


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
