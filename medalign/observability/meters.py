"""Throughput, time and memory of a run. The counts are summed over the ranks once per row of metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from medalign.distributed import sum_over_ranks


class Throughput:
    """Samples and tokens per second over all ranks, and the fraction of time that ranks wait for data.

    Args:
        device: device of the tensors that are summed over the ranks.
        clock: returns the time in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._restart()

    def add(self, samples: int, tokens: int) -> None:
        """Count one micro-batch of this rank."""
        self._samples += samples
        self._tokens += tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time spent inside the context as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def reduce(self) -> dict[str, float]:
        """Return the speeds over all ranks since the last call. Every rank must call it.

        Time is the mean over the ranks.
        """
        local = [self._samples, self._tokens, self._waited, self._clock() - self._start, 1.0]
        stacked = torch.tensor(local, dtype=torch.float64, device=self._device)
        samples, tokens, waited, seconds, ranks = sum_over_ranks({"speed": stacked})["speed"].tolist()
        self._restart()
        wall = max(seconds / ranks, 1e-9)
        return {
            "speed/samples_per_second": samples / wall,
            "speed/tokens_per_second": tokens / wall,
            "speed/data_wait_share": min(waited / max(seconds, 1e-9), 1.0),
        }

    def _restart(self) -> None:
        self._samples = self._tokens = 0
        self._waited = 0.0
        self._start = self._clock()


class ModuleTimer:
    """Measures how long the forward passes of a module take on its device.

    On a GPU they are measured on the stream on which they run, without waiting for it.

    Args:
        module: the module. It gets hooks, which stay.
        device: the device of its forward passes.
        clock: returns the time in seconds; used on a CPU.
    """

    def __init__(self, module: nn.Module, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._passes: list[tuple[Any, Any]] = []
        self._began: Any = None
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> float:
        """Return the seconds of the passes since the last call. On a GPU it waits for the last one of them."""
        passes, self._passes = self._passes, []
        if self._device.type != "cuda":
            return float(sum(end - start for start, end in passes))
        if passes:
            passes[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in passes)) / 1e3

    def _begin(self, *_: Any) -> None:
        self._began = self._mark()

    def _end(self, *_: Any) -> None:
        self._passes.append((self._began, self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return the largest memory of this rank so far, in GiB: resident in the process and, with a GPU, on the GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory/cpu_peak_gib": peak / 2**30 if sys.platform == "darwin" else peak / 2**20}
    if device.type == "cuda":
        found["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["memory/gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found
