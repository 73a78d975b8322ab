"""GPU times by Triton's own benchmark, which empties the L2 cache before every run."""

from __future__ import annotations

from collections.abc import Callable

from triton import testing

WARM_UP = 2  # unmeasured runs' worth of time


def gpu_milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return the time of each of about `repeats` runs of `step` on the current CUDA device.

    `do_bench` takes a duration instead of a number of runs, so the step is timed once to convert one into the other.
    """
    estimate = testing.do_bench(step, warmup=0, rep=0, return_mode="min")
    times: list[float] = testing.do_bench(step, warmup=WARM_UP * estimate, rep=repeats * estimate, return_mode="all")
    return times
