"""Correctness, time and peak memory of every path of an operation, value and gradient together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from medalign.benchmark.kernels.case import KernelCase, Problem
from medalign.errors import KernelError

WARM_UP = 2  # unmeasured runs: compilation, allocation, clocks
IMPLEMENTATIONS = ("chunked", "triton")  # must be within the tolerance; the other paths are there to compare with


def measure_all(
    cases: Sequence[KernelCase],
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int] | None,
    repeats: int,
    skip: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row for each problem and path. Raises KernelError for an implementation beyond its tolerance."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelError("no CUDA device is there; measure with --device cpu, or compile ahead of time with --compile")
    rows = []
    for case in cases:
        for problem in case.problems(device, dtype, tokens):
            wanted = problem.expected()
            for path, forward in problem.paths.items():
                if path not in skip:
                    rows.append({"operation": case.name} | _row(problem, path, forward, wanted, device, repeats))
    return rows


def _row(
    problem: Problem,
    path: str,
    forward: Callable[[], torch.Tensor],
    wanted: tuple[torch.Tensor, ...],
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    def step() -> tuple[torch.Tensor, ...]:
        value = forward()
        return value.detach(), *torch.autograd.grad(value, problem.leaves, problem.upstream.to(value.dtype))

    row: dict[str, Any] = {"problem": problem.name, "path": path}
    try:
        errors = [_error(one, other) for one, other in zip(step(), wanted, strict=True)]
        times, megabytes = milliseconds(step, device, repeats), _peak(step, device)
    except torch.OutOfMemoryError:
        unknown = float("nan")
        return row | dict.fromkeys(("value error", "gradient error", "ms", "p20", "p80", "extra MB"), unknown)
    value_error, gradient_error = errors[0], max(errors[1:])
    if path in IMPLEMENTATIONS:
        _check_tolerance(problem, path, value_error, gradient_error)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return row | {
        "value error": value_error,
        "gradient error": gradient_error,
        "ms": statistics.median(times),
        "p20": fifths[0],
        "p80": fifths[-1],
        "extra MB": megabytes,
    }


def _check_tolerance(problem: Problem, path: str, value_error: float, gradient_error: float) -> None:
    value_limit, gradient_limit = problem.tolerances
    if not (value_error <= value_limit and gradient_error <= gradient_limit):  # NaN is beyond every limit
        raise KernelError(
            f"{path} is wrong on {problem.name}: relative error {value_error:.1e} of the value (allowed "
            f"{value_limit:.0e}), {gradient_error:.1e} of the gradients (allowed {gradient_limit:.0e}: {problem.why}); "
            "train with the other implementations and report this"
        )


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Of each of `repeats` runs: by the device's own clock where it has one."""
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begun))
    return times


def _peak(step: Callable[[], object], device: torch.device) -> float:
    """Megabytes at the peak beyond what the inputs take."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident(status, "VmRSS")
    step()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, field: str) -> float:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
