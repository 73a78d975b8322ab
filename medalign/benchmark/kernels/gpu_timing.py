"""Times of the device and of the host on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WARM_UP = 3  # unmeasured runs
CYCLES = 2.0e9  # of the device in a second, at most
L2 = 2**28  # bytes that replace what the L2 cache holds


def gpu_milliseconds(step: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Return the times of the device and of the host for each of `repeats` runs of `step`, with an empty L2 cache.

    The device sleeps before each run until the host has enqueued all of it. So the device's time has no gaps in which
    it waits for the host, as in a training step whose host is ahead; a run that waits for the device has them.
    """
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    estimate = _host_seconds(step)
    cache = torch.empty(L2, dtype=torch.uint8, device="cuda")
    device, host = [], []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(int(CYCLES * (2 * estimate + 1e-3)))
        begin.record()
        host.append(1e3 * _host_seconds(step))
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return device, host


def _host_seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun
