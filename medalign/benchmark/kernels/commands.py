"""The implementation of `medalign bench kernels`: each function returns tables, which are printed and saved as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medalign.benchmark.kernels import registry
from medalign.benchmark.kernels.compilation import compile_all
from medalign.benchmark.kernels.measurement import measure_all
from medalign.benchmark.kernels.roofline import TITLE, cost_rows
from medalign.benchmark.kernels.text import as_table
from medalign.benchmark.kernels.tuning import tune_all
from medalign.errors import KernelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Rows = list[dict[str, Any]]


def compilation(kernel: str | None, architectures: Sequence[str]) -> dict[str, Rows]:
    """Compile all binaries; returns their figures and the cost models."""
    cases = registry.select_cases(kernel)
    binaries = compile_all(cases, architectures)
    return {f"compiled ahead of time, triton {_triton_version()}": binaries, TITLE: cost_rows(cases)}


def measurement(
    kernel: str | None, device: str, dtype: str | None, tokens: Sequence[int] | None, repeats: int, skip: Sequence[str]
) -> dict[str, Rows]:
    """Measure all paths. `dtype` defaults to bf16 on a GPU and to fp32 on the CPU: Triton cannot interpret bf16."""
    place = torch.device(device)
    chosen = DTYPES[dtype or ("bf16" if place.type == "cuda" else "fp32")]
    rows = measure_all(registry.select_cases(kernel), place, chosen, tokens, repeats, skip)
    return {f"value and gradient together, measured on {_machine(place)}, torch {torch.__version__}": rows}


def tuning(
    kernel: str | None, device: str, repeats: int, folder: Path | None = None, seconds: float | None = None
) -> dict[str, Rows]:
    """Tune the tile tables; see `tune_all` for `folder` and `seconds`."""
    place = torch.device(device)
    rows = tune_all(registry.select_cases(kernel), place, repeats, folder, seconds)
    return {f"tuned on {_machine(place)}": rows}


def format_tables(tables: dict[str, Rows], output: Path | None) -> str:
    """Format the tables as text, and write them to `output` as JSON if given."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join(as_table(title, rows) for title, rows in tables.items()) + "\n"


def raise_on_failed_checks(tables: dict[str, Rows]) -> None:
    """Raise KernelError if a compiled binary has a complaint."""
    bad = [
        f"{row['architecture']} {row['kernel']}: {row['complaint']}"
        for rows in tables.values()
        for row in rows
        if row.get("complaint")
    ]
    if bad:
        raise KernelError("unusable binaries; change the tile table: " + "; ".join(bad))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")
