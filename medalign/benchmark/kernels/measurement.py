"""Correctness, time and peak memory of every path of an operation, value and gradient together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medalign.benchmark.kernels.case import KernelCase, Problem
from medalign.benchmark.kernels.gpu_timing import gpu_milliseconds
from medalign.errors import KernelError

IMPLEMENTATIONS = ("chunked", "triton")  # must be within the tolerance; the other paths are baselines
MEGABYTE = 2**20
_FIGURES = ("value error", "gradient error", "ms", "p20", "p80", "host ms", "extra MB")

Step = Callable[[], Any]


class CpuTime(NamedTuple):
    """Seconds of one run. On one thread, processor time hardly depends on the load of the machine."""

    wall: float
    processor: float


def measure_all(
    cases: Sequence[KernelCase],
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int] | None,
    repeats: int,
    skip: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure every problem of the cases.

    Args:
        cases: the operations.
        device: where the problems are created and solved.
        dtype: element type of the inputs.
        tokens: token counts of the problems; None for each case's own.
        repeats: timed runs per path.
        skip: names of paths to leave out.

    Returns:
        One row per problem and path: errors relative to float64, milliseconds (median, 20th and 80th percentile), those
        of a GPU's host, and megabytes beyond the inputs. The figures of a path that runs out of memory are NaN.

    Raises:
        KernelError: an implementation exceeds its tolerance, or there is no CUDA device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelError("no CUDA device found; measure with --device cpu, or compile ahead of time with --compile")
    rows = []
    for case in cases:
        for problem in case.problems(device, dtype, tokens):
            expected = problem.expected()
            for path in problem.paths:
                if path not in skip:
                    rows.append({"operation": case.name} | _row(problem, path, expected, device, repeats))
    return rows


def value_and_gradients(problem: Problem, path: str) -> tuple[torch.Tensor, ...]:
    """Solve a problem once: its value, then the gradient of each leaf."""
    value = problem.paths[path]()
    return value.detach(), *torch.autograd.grad(value, problem.leaves, problem.upstream.to(value.dtype))


def _row(
    problem: Problem, path: str, expected: tuple[torch.Tensor, ...], device: torch.device, repeats: int
) -> dict[str, Any]:
    def step() -> tuple[torch.Tensor, ...]:
        return value_and_gradients(problem, path)

    row: dict[str, Any] = {"problem": problem.name, "path": path}
    try:
        errors = [_relative_error(one, other) for one, other in zip(step(), expected, strict=True)]
        (times, host), megabytes = milliseconds(step, device, repeats), peak_megabytes(step, device)
    except torch.OutOfMemoryError:
        return row | dict.fromkeys(_FIGURES, float("nan"))
    value_error, gradient_error = errors[0], max(errors[1:])
    if path in IMPLEMENTATIONS:
        _check_tolerance(problem, path, value_error, gradient_error)
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
    middle, waiting = statistics.median(times), statistics.median(host)
    figures = (value_error, gradient_error, middle, fifths[0], fifths[-1], waiting, megabytes)
    return row | dict(zip(_FIGURES, figures, strict=True))


def _check_tolerance(problem: Problem, path: str, value_error: float, gradient_error: float) -> None:
    value_limit, gradient_limit = problem.tolerances
    if not (value_error <= value_limit and gradient_error <= gradient_limit):  # NaN exceeds every limit
        raise KernelError(
            f"{path} is wrong on {problem.name}: relative error {value_error:.1e} of the value (allowed "
            f"{value_limit:.0e}), {gradient_error:.1e} of the gradients (allowed {gradient_limit:.0e}: {problem.why}); "
            "train with another implementation and report this"
        )


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def milliseconds(step: Step, device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    """The time of each run on the device, and on the host, which enqueues it; on the CPU they are the same."""
    if device.type == "cuda":
        return gpu_milliseconds(step, repeats)
    times = [1e3 * each.wall for each in cpu_times(step, repeats)]
    return times, times


def cpu_times(step: Step, repeats: int, short: float = 0.0) -> list[CpuTime]:
    """Time `repeats` runs, and up to ten times as many while all of them together take less than `short` seconds."""
    times: list[CpuTime] = []
    while len(times) < repeats or (len(times) < 10 * repeats and sum(each.wall for each in times) < short):
        start = CpuTime(time.perf_counter(), time.process_time())
        step()
        times.append(CpuTime(time.perf_counter() - start.wall, time.process_time() - start.processor))
    return times


def peak_megabytes(step: Step, device: torch.device) -> float:
    """Peak memory of one run beyond what was in use before it; NaN where the system does not report it.

    Allocated memory on a GPU, resident memory of the process on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / MEGABYTE
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident(status, "VmRSS")
    step()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, field: str) -> float:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
